"""Compares a sweep with the same trials one by one: time, saved steps, and the best score.

    python benchmarks/bench_sweep.py [--seeds 5] [--sweep quickstart] [--arm lora] [--quick] [key=value ...]

For each seed of the sampler the arm is searched by `lorasweep sweep`: trials in packs, pruned and refilled. Then every
trial that was asked for is trained alone to its last step. So both sides train the same settings, and a difference of
the best scores is what pruning missed (and rounding: packs and runs alone sum in another order). The search's time is
that of its record: Optuna and the records are in it, loading is in neither. Which side
goes first can't change, because the search says what the trials are; a ratio is one within a seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from lorasweep.api import run_sweep
from lorasweep.config.data import Direction
from lorasweep.record import RunRecord, read_run
from lorasweep.sweep.definition.sweep_file import find_sweep_file
from lorasweep.training.inputs import build_inputs
from lorasweep.training.restore import restore_config
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder

QUICK = (
    "trainer.max_steps=8",
    "trainer.eval_every_steps=2",
    "trainer.batch_size=2",
    "data.max_validation_blocks=8",
    "pruner.rungs=[0.4]",
    "worker.pack_size=2",
    "sweep.trials=4",
)
HEADINGS = (
    "seed",
    "trials",
    "packed s",
    "one by one s",
    "× faster",
    "steps",
    "saved",
    "best packed",
    "best one by one",
    "worse by",
    "same best",
    "winner",
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way of running the trials."""

    seconds: float
    records: list[RunRecord]
    """By the trial's number."""

    def best(self, direction: Direction) -> tuple[float, int]:
        """The best score of a complete trial, and its number."""
        sign = 1 if direction == "minimize" else -1
        complete = [(r.score, n) for n, r in enumerate(self.records) if r.status == "complete" and r.score is not None]
        return min(complete, key=lambda pair: sign * pair[0])


@dataclass(frozen=True, kw_only=True)
class Row:
    """The results of one seed."""

    seed: int
    packed: Side
    alone: Side
    direction: Direction

    @property
    def ratio(self) -> float:
        """Time one by one over time of the sweep."""
        return self.alone.seconds / self.packed.seconds

    @property
    def worse_by(self) -> float:
        """How much worse the sweep's best score is, in the metric; negative if it is better."""
        difference = self.packed.best(self.direction)[0] - self.alone.best(self.direction)[0]
        return difference if self.direction == "minimize" else -difference

    @property
    def saved_fraction(self) -> float:
        """Share of the planned steps that pruning saved."""
        return 1 - _steps(self.packed) / _steps(self.alone)

    def cells(self) -> Sequence[str]:
        """The row of the table."""
        (packed, of_packed), (alone, of_alone) = self.packed.best(self.direction), self.alone.best(self.direction)
        return (
            str(self.seed),
            str(len(self.packed.records)),
            f"{self.packed.seconds:.1f}",
            f"{self.alone.seconds:.1f}",
            f"{self.ratio:.2f}",
            f"{_steps(self.alone):,}",
            f"{100 * self.saved_fraction:.0f} %",
            f"{packed:.4f}",
            f"{alone:.4f}",
            f"{self.worse_by:+.4f}",
            "yes" if of_packed == of_alone else "no",
            _settings(self.packed.records[of_packed]),
        )


def _steps(side: Side) -> int:
    return sum(record.steps_done for record in side.records)


def _settings(record: RunRecord) -> str:
    """Returns the settings that the arm searches."""
    method, lr = record.config["method"], record.config["optim"]["lr"]
    rank = f"rank {method['rank']}, α/r {method['alpha'] / method['rank']:g}, " if "rank" in method else ""
    return f"{rank}lr {lr:.3g}"


def search(source: Path, folder: Path, words: Sequence[str]) -> Side:
    """Runs the sweep like `lorasweep sweep` and returns its results."""
    record = run_sweep(source, overrides=[*words, "confirm.seeds=0"], output=folder, progress=None).record
    return Side(seconds=record.makespan_s, records=[read_run(folder / row.run) for row in record.trials])


def repeat_alone(trials: Sequence[RunRecord], folder: Path) -> Side:
    """Trains the same settings to the last step, one after another."""
    configs = [restore_config(record) for record in trials]
    inputs = build_inputs(configs[0])
    started = time.monotonic()
    records = [train_run(config, RunFolder(path=folder / str(n)), inputs=inputs) for n, config in enumerate(configs)]
    return Side(seconds=time.monotonic() - started, records=records)


def measure(source: Path, seed: int, words: Sequence[str]) -> Row:
    """Both sides of one seed."""
    with tempfile.TemporaryDirectory() as name:
        packed = search(source, Path(name) / "sweep", [*words, f"sweep.seed={seed}"])
        alone = repeat_alone(packed.records, Path(name) / "alone")
    return Row(seed=seed, packed=packed, alone=alone, direction=packed.records[0].direction)


def write_one_arm(sweep: str, arm: str, folder: Path) -> Path:
    """Writes the sweep file with one of its arms."""
    content = OmegaConf.to_container(OmegaConf.load(find_sweep_file(sweep)), resolve=True)
    if arm not in content["arms"]:
        raise SystemExit(f"--arm must be one of {', '.join(content['arms'])}, but got {arm!r}.")
    content["arms"] = {arm: content["arms"][arm]}
    path = folder / f"{arm}.yaml"
    OmegaConf.save(OmegaConf.create(content), path)
    return path


def print_summary(rows: Sequence[Row]) -> None:
    """Returns the text below the table."""
    ratios, worse = [row.ratio for row in rows], [row.worse_by for row in rows]
    same = sum(row.packed.best(row.direction)[1] == row.alone.best(row.direction)[1] for row in rows)
    saved = statistics.median(row.saved_fraction for row in rows)
    print(
        f"\nMedian of {len(rows)} seeds: {statistics.median(ratios):.2f} × faster ({min(ratios):.2f} to "
        f"{max(ratios):.2f}), {100 * saved:.0f} % of the steps saved, best score worse by "
        f"{statistics.median(worse):+.4f} ({min(worse):+.4f} to {max(worse):+.4f}), the same best trial in {same}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value", help="as for `lorasweep sweep`")
    parser.add_argument("--sweep", default="quickstart")
    parser.add_argument("--arm", default="lora")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds of the sampler")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: only checks that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    words = [*(QUICK if arguments.quick else ()), *arguments.words]
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{arguments.threads} threads"
    print(f"\n{arguments.sweep}, arm {arguments.arm}, {place}\n")
    print(f"| {' | '.join(HEADINGS)} |\n|{'--:|' * len(HEADINGS)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        source = write_one_arm(arguments.sweep, arguments.arm, Path(name))
        for seed in range(1 if arguments.quick else arguments.seeds):
            rows.append(measure(source, seed, words))
            print(f"| {' | '.join(rows[-1].cells())} |", flush=True)
    print_summary(rows)


if __name__ == "__main__":
    main()
