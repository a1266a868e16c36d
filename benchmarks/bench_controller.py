"""Measures how many trials per second the controller hands out and takes back, with many workers that train nothing.

One loop simulates all workers: it picks a worker at random (seeded), makes this worker's next call (`take`, `report` at
each evaluation, `tell`), and times the call. A worker without a trial asks again, as at the end of a batch.

    python benchmarks/bench_controller.py --workers 1000 --trials 5000 --sampler tpe
"""

from __future__ import annotations

import argparse
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import yaml

from lorasweep.config.data import get_built_in_metric
from lorasweep.record import RunRecord
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.lifecycle import create_sweep, reopen_sweep
from lorasweep.sweep.definition.arms import read_definition

SPACE = {"method.rank": [1, 2, 4, 8, 16, 32, 64], "optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
METRIC = "bits_per_byte"
CALLS = ("take", "report", "tell")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--every", type=int, help="trials per row of the table; default: all")
    parser.add_argument("--folder", type=Path, help="parent of the sweep's folder; default: a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        sweep = make_sweep(Path(folder), asked.sampler, asked.trials)
        simulate(sweep, asked.workers, every=asked.every or asked.trials)
        measure_restart(sweep.path)


def make_sweep(folder: Path, sampler: str, num_trials: int) -> SweepFolder:
    """Creates the folder of a sweep with one arm and the default evaluations."""
    file = folder / "many.yaml"
    arm = {"settings": {"method": "lora"}, "space": SPACE, "trials": num_trials}
    content = {"name": "many", "settings": {"sampler": sampler, "confirm.seeds": 0}, "arms": {"lora": arm}}
    file.write_text(yaml.safe_dump(content))
    definition = read_definition(file, [])
    return create_sweep(definition, folder / "sweep", metric=get_built_in_metric(METRIC))


def invent_score(assignment: Assignment, step: int) -> float:
    """Returns an invented score: it is best at a learning rate of 0.01 and hardly depends on the rank."""
    params, noise = assignment.trial.shown_params, random.Random(assignment.trial.number).gauss(0, 0.01)
    return 1.2 + 0.1 * abs(math.log10(params["optim.lr"]) + 2) + 0.01 / params["method.rank"] + 1 / step + noise


class TrainingWorker:
    """A simulated worker with a trial. Each call of `advance` makes its next call to the controller."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests = 0
        self.assignment: Assignment | None = None
        self.steps: list[int] = []

    def advance(self, controller: Any, timed: Callable[..., Any]) -> None:
        """Makes one call."""
        if self.assignment is None:
            self.requests += 1
            self.assignment = timed("take", controller.take, worker=self.name, request=self.requests)
            if self.assignment is not None:
                trainer = self.assignment.config.trainer
                self.steps = list(range(trainer.eval_every_steps, trainer.max_steps + 1, trainer.eval_every_steps))
            return
        step = self.steps.pop(0)
        value = invent_score(self.assignment, step)
        timed("report", controller.report, [(self.assignment, step, {METRIC: value})])  # stops no trial
        if self.steps:
            return
        record = RunRecord(
            status="complete",
            config=asdict(self.assignment.config),
            metric=METRIC,
            direction="minimize",
            best={METRIC: value, "step": step},
            steps_done=step,
        )
        timed("tell", controller.tell, self.assignment, record)
        self.assignment = None


class Times:
    """Seconds of each call by kind, and the journal's size."""

    def __init__(self, path: Path) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in CALLS}
        self.cpu_s = 0.0
        self._journal = path / "journal.log"
        self._journal_before = self._journal.stat().st_size

    def __call__(self, kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the controller and keeps the duration."""
        began, cpu_began = time.perf_counter(), time.process_time()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds[kind].append(time.perf_counter() - began)
            self.cpu_s += time.process_time() - cpu_began

    def print_row(self, label: str, num_trials: int) -> None:
        """Prints the measurements since the last row and resets them."""
        total = sum(map(sum, self.seconds.values()))
        size = self._journal.stat().st_size
        cells = "  ".join(describe_ms(self.seconds[name]) for name in CALLS)
        rss = psutil.Process().memory_info().rss / 2**20
        rates = f"{num_trials / total:>8.1f} {num_trials / self.cpu_s:>9.1f}"
        written = f"{(size - self._journal_before) / num_trials:>7.0f}"
        print(f"{label:>9} {rates}  {cells} {rss:>7.0f} {written}", flush=True)
        self.seconds, self.cpu_s = {name: [] for name in CALLS}, 0.0
        self._journal_before = size

    @staticmethod
    def print_head() -> None:
        cells = "  ".join(f"{name + ' p50 / p99 / max ms':>24}" for name in CALLS)
        print(f"{'trials':>9} {'trials/s':>8} {'per CPU s':>9}  {cells} {'MiB':>7} {'journal':>7}")


def describe_ms(seconds: Sequence[float]) -> str:
    """Returns the median, the 99th percentile and the maximum, in milliseconds."""
    ordered = sorted(1e3 * s for s in seconds) or [math.nan]
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    return f"{ordered[len(ordered) // 2]:>6.1f} /{p99:>7.1f} /{ordered[-1]:>7.0f}"


def simulate(sweep: SweepFolder, num_workers: int, *, every: int) -> None:
    """Simulates a whole sweep and prints a row after every `every` started trials."""
    controller = Controller(sweep, session="bench")
    workers = [TrainingWorker(f"bench-{number}") for number in range(num_workers)]
    drawn, times = random.Random(0), Times(sweep.path)
    trials = controller.search.arms["lora"]
    sampler = trials.arm.sweep_config.sampler.name
    asked = f"{num_workers} workers, {trials.planned:,} trials, {sampler}"
    print(f"{asked}; load {os.getloadavg()[0]:.1f}")
    times.print_head()
    printed = 0
    while not controller.is_over():
        drawn.choice(workers).advance(controller, times)
        begun = len(trials.trials)
        if begun >= printed + every and begun < trials.planned:
            times.print_row(f"{begun:,}", begun - printed)
            printed = begun
    times.print_row("end", trials.planned - printed)
    began = time.perf_counter()
    controller.finish()
    print(f"finish: {time.perf_counter() - began:.1f} s")
    sweep.close()


def measure_restart(path: Path) -> None:
    """Prints the seconds that a restarted controller needs to read the journal."""
    began = time.perf_counter()
    sweep = reopen_sweep(path)
    read = time.perf_counter()
    Controller(sweep, session="bench")
    ended = time.perf_counter()
    size = (path / "journal.log").stat().st_size / 2**20
    print(
        f"restart: journal of {size:.0f} MiB replayed in {read - began:.1f} s, controller made in {ended - read:.1f} s"
    )
    sweep.close()


if __name__ == "__main__":
    main()
