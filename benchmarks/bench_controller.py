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

import numpy as np
import psutil
import yaml
from side_by_side import print_head, print_row

from lorasweep.config.data import ScoreMetric
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
    parser.add_argument("--folder", type=Path, help="parent of the sweep's folder; default: a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        sweep = make_sweep(Path(folder), asked.sampler, asked.trials)
        simulate(sweep, asked.workers)
        measure_restart(sweep.path)


def make_sweep(folder: Path, sampler: str, num_trials: int) -> SweepFolder:
    """Creates the folder of a sweep with one arm and the default evaluations."""
    file = folder / "many.yaml"
    arm = {"settings": {"method": "lora"}, "space": SPACE, "trials": num_trials}
    content = {"name": "many", "settings": {"sampler": sampler, "confirm.seeds": 0}, "arms": {"lora": arm}}
    file.write_text(yaml.safe_dump(content))
    definition = read_definition(file)
    return create_sweep(definition, folder / "sweep", metric=ScoreMetric(name=METRIC, direction="minimize"))


def invent_score(assignment: Assignment, step: int) -> float:
    """Returns an invented score: it is best at a learning rate of 0.01 and hardly depends on the rank."""
    params, noise = assignment.trial.shown_params, random.Random(assignment.trial.number).gauss(0, 0.01)
    return 1.2 + 0.1 * abs(math.log10(params["optim.lr"]) + 2) + 0.01 / params["method.rank"] + 1 / step + noise


class TrainingWorker:
    """A simulated worker with a trial. Each call of `advance` makes its next call to the controller."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.assignment: Assignment | None = None
        self.steps: list[int] = []

    def advance(self, controller: Any, timed: Callable[..., Any]) -> None:
        """Makes one call."""
        if self.assignment is None:
            pack = timed("take", controller.take, worker=self.name, slots={"lora": 1})
            if pack:
                [self.assignment] = pack
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


def simulate(sweep: SweepFolder, num_workers: int) -> None:
    """Simulates a whole sweep and prints the durations of its calls."""
    controller = Controller(sweep)
    workers = [TrainingWorker(f"bench-{number}") for number in range(num_workers)]
    drawn, seconds, cpu_s = random.Random(0), {name: list[float]() for name in CALLS}, 0.0

    def timed(kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal cpu_s
        began, cpu_began = time.perf_counter(), time.process_time()
        found = call(*args, **kwargs)
        seconds[kind].append(time.perf_counter() - began)
        cpu_s += time.process_time() - cpu_began
        return found

    while not controller.is_over():
        drawn.choice(workers).advance(controller, timed)
    trials, total = controller.search.arms["lora"].planned, sum(map(sum, seconds.values()))
    print(f"{num_workers} workers, {trials:,} trials; load {os.getloadavg()[0]:.1f}")
    print_head("trials/s", "per CPU s", *(f"{name}: p50, p99, max ms" for name in CALLS), "MiB")
    memory = psutil.Process().memory_info().rss / 2**20
    print_row(trials / total, trials / cpu_s, *(describe_ms(seconds[name]) for name in CALLS), memory)
    began = time.perf_counter()
    controller.finish()
    print(f"finish: {time.perf_counter() - began:.1f} s")
    sweep.close()


def describe_ms(seconds: Sequence[float]) -> str:
    """Returns the median, the 99th percentile and the maximum, in milliseconds."""
    return ", ".join(f"{1000 * value:.1f}" for value in np.quantile(seconds, (0.5, 0.99, 1)))


def measure_restart(path: Path) -> None:
    """Prints the seconds that the controller of a resumed sweep needs to read the journal."""
    began = time.perf_counter()
    sweep = reopen_sweep(path)
    read = time.perf_counter()
    Controller(sweep)
    ended = time.perf_counter()
    size = (path / "journal.log").stat().st_size / 2**20
    print(
        f"restart: journal of {size:.0f} MiB replayed in {read - began:.1f} s, controller made in {ended - read:.1f} s"
    )
    sweep.close()


if __name__ == "__main__":
    main()
