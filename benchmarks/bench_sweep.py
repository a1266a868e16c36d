"""A sweep as it is run against the same trials one by one: time, steps saved, what becomes of the best score.

    python benchmarks/bench_sweep.py [--seeds 5] [--sweep quickstart] [--arm lora] [--quick] [key=value ...]

For each seed of the sampler the arm is searched as `lorasweep sweep` does it: trials in packs, pruned and refilled.
Then every trial that was asked for is trained alone to its end. So both sides train the same settings, and a difference
of the best scores is what pruning missed (and rounding: packs and runs alone sum in another order). The search's time
contains the choice of the pack's size, Optuna and the records; loading the model and the text is left out of both.
Which side goes first can't change, because the search says what the trials are; a ratio is one within a seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasweep.record import Direction, RunRecord, read_run
from lorasweep.sweep import (
    Arm,
    Benches,
    Definition,
    Worker,
    check_definition,
    create_sweep,
    find_sweep_file,
    read_definition,
    sweep_direction,
)
from lorasweep.training import RunPlace, train_run

QUICK = (
    "trainer.max_steps=8",
    "trainer.eval_every_steps=2",
    "trainer.batch_size=2",
    "data.max_validation_blocks=8",
    "pruner.min_steps=2",
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
)


class Silent:
    """An observer that shows nothing."""

    def trial_started(self, arm: Arm, number: int, params: Mapping[str, Any], *, steps: int) -> None:
        """Nothing."""

    def evaluated(self, arm: Arm, number: int, step: int, value: float) -> None:
        """Nothing."""

    def trial_ended(self, arm: Arm, number: int, state: str, value: float | None, *, wall_s: float) -> None:
        """Nothing."""


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
    """What one seed gave."""

    seed: int
    packed: Side
    alone: Side
    direction: Direction

    @property
    def ratio(self) -> float:
        """How many times faster."""
        return self.alone.seconds / self.packed.seconds

    @property
    def worse_by(self) -> float:
        """How much worse the best score is, in the metric; negative where it is better."""
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
        )


def _steps(side: Side) -> int:
    return sum(record.steps_done for record in side.records)


def search(definition: Definition, folder: Path, benches: Benches) -> Side:
    """The sweep as `lorasweep sweep` runs it."""
    configs = check_definition(definition, benches)
    sweep = create_sweep(definition, folder, configs=configs, direction=sweep_direction(configs))
    started = time.perf_counter()
    try:
        worker = Worker(
            sweep, benches, observer=Silent(), stop_requested=lambda: False, run_ended=lambda record, path, params: None
        )
        worker.run()
    finally:
        sweep.close()
    seconds = time.perf_counter() - started
    return Side(seconds=seconds, records=[read_run(folder / row.run) for row in sweep.record.trials])


def repeat_alone(search: Definition, folder: Path, trials: Sequence[Mapping[str, Any]], benches: Benches) -> Side:
    """Every trial to its end, one after another."""
    (arm,) = search.arms
    started = time.perf_counter()
    records = []
    for number, params in enumerate(trials):
        config = arm.compose(params)
        records.append(train_run(config, RunPlace(folder=folder / str(number)), bench=benches.of(config)))
    return Side(seconds=time.perf_counter() - started, records=records)


def measure(definition: Definition, seed: int, benches: Benches) -> Row:
    """Both sides of one seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = search(definition, folder / "sweep", benches)
        trials = [_swept(record, definition.arms[0]) for record in packed.records]
        alone = repeat_alone(definition, folder / "alone", trials, benches)
        configs = check_definition(definition, benches)
    return Row(seed=seed, packed=packed, alone=alone, direction=sweep_direction(configs))


def _swept(record: RunRecord, arm: Arm) -> dict[str, Any]:
    values = {}
    for key in arm.space:
        value: Any = record.config
        for name in key.split("."):
            value = value[name]
        values[key] = value
    return values


def one_arm(definition: Definition, name: str) -> Definition:
    """The sweep of one of its arms."""
    arms = tuple(arm for arm in definition.arms if arm.name == name)
    if not arms:
        raise SystemExit(f"--arm must be one of {', '.join(arm.name for arm in definition.arms)}, but got {name!r}.")
    return dataclasses.replace(definition, arms=arms)


def print_table(rows: Sequence[Row]) -> None:
    """The rows are printed as they come; this is what stands below them."""
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
    parser.add_argument("--seeds", type=int, default=5, help="so many seeds of the sampler")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: does it run?")
    arguments = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # read as torch starts; the command line sets it for itself
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(arguments.threads)
    benches, rows = Benches(), []
    words = [*(QUICK if arguments.quick else ()), *arguments.words]
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{arguments.threads} threads"
    print(f"\n{arguments.sweep}, arm {arguments.arm}, {place}\n")
    print(f"| {' | '.join(HEADINGS)} |\n|{'--:|' * len(HEADINGS)}")
    for seed in range(1 if arguments.quick else arguments.seeds):
        definition = read_definition(find_sweep_file(arguments.sweep), [*words, f"sweep.seed={seed}"])
        rows.append(measure(one_arm(definition, arguments.arm), seed, benches))
        print(f"| {' | '.join(rows[-1].cells())} |", flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()
