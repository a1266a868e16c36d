"""Measures how many trials per second the controller hands out and takes back, with many workers that train nothing.

One loop simulates all workers: it picks a worker at random (seeded), makes this worker's next call (`take`, `report` at
each evaluation, `tell`), and times the call. A worker without a trial asks again, as at the end of a batch.

    python benchmarks/bench_controller.py --workers 1000 --trials 5000 --sampler tpe

With `--ray N` the workers are N Ray actors on this machine, which call the controller's actor as often as they can:

    python benchmarks/bench_controller.py --ray 64 --trials 2000 --sampler tpe
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import yaml
from optuna.trial import TrialState, create_trial

from lorasweep.config.data import get_built_in_metric
from lorasweep.record import RunRecord
from lorasweep.sweep.controller.arm_trials import TRIAL_ATTRIBUTE
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.lifecycle import create_sweep, reopen_sweep
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.workers.ray_cluster import start_local_cluster

SPACE = {"method.rank": [1, 2, 4, 8, 16, 32, 64], "optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
METRIC = "bits_per_byte"
CALLS = ("take", "report", "tell")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--filled", type=int, default=0, help="complete trials that the arm has at the beginning")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--every", type=int, help="trials per row of the table; default: all")
    parser.add_argument(
        "--ray", type=int, help="number of Ray actors that call the controller; default: one loop without Ray"
    )
    parser.add_argument("--folder", type=Path, help="parent of the sweep's folder; default: a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        sweep = make_sweep(Path(folder), asked.sampler, asked.filled + asked.trials)
        fill(sweep, asked.filled)
        if asked.ray:
            measure_ray(sweep, asked.ray)
            return
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


def fill(sweep: SweepFolder, num_trials: int) -> None:
    """Adds complete trials, drawn at random."""
    (arm,) = sweep.definition.arms
    study, drawn = sweep.open_study(arm.name), random.Random(0)
    for number in range(num_trials):
        params = {"method.rank": drawn.choice(SPACE["method.rank"]), "optim.lr": 10 ** drawn.uniform(-4, -1)}
        score = score_of(params, number, 150)
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=score,
                params=params,
                distributions=arm.space,
                intermediate_values={step: score_of(params, number, step) for step in (25, 50, 75, 100, 125, 150)},
                user_attrs={TRIAL_ATTRIBUTE: {"state": "complete", "value": score, "order": number}},
            )
        )


def value_at(assignment: Assignment, step: int) -> float:
    """Returns an invented score of a trial."""
    return score_of(assignment.trial.shown_params, assignment.trial.number, step)


def score_of(params: Mapping[str, Any], number: int, step: int) -> float:
    """Returns an invented score: it is best at a learning rate of 0.01 and hardly depends on the rank."""
    noise = random.Random(number).gauss(0, 0.01)
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
        value = value_at(self.assignment, step)
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
    """Seconds of each call by kind, number of opened files, and the journal's size."""

    def __init__(self, path: Path) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in CALLS}
        self.opened = 0
        self.cpu_s = 0.0
        self._journal = path / "journal.log"
        self._journal_before = self._journal.stat().st_size
        self._in_call = False

        def count(event: str, _: Any) -> None:
            self.opened += event == "open" and self._in_call

        sys.addaudithook(count)

    def __call__(self, kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the controller and keeps the duration."""
        self._in_call = True
        began, cpu_began = time.perf_counter(), time.process_time()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds[kind].append(time.perf_counter() - began)
            self.cpu_s += time.process_time() - cpu_began
            self._in_call = False

    def print_row(self, label: str, num_trials: int) -> None:
        """Prints the measurements since the last row and resets them."""
        total = sum(map(sum, self.seconds.values()))
        size = self._journal.stat().st_size
        cells = "  ".join(describe_ms(self.seconds[name]) for name in CALLS)
        rss = psutil.Process().memory_info().rss / 2**20
        rates = f"{num_trials / total:>8.1f} {num_trials / self.cpu_s:>9.1f}"
        written = f"{self.opened / num_trials:>6.2f} {(size - self._journal_before) / num_trials:>7.0f}"
        print(f"{label:>9} {rates}  {cells} {rss:>7.0f} {written}", flush=True)
        self.seconds, self.opened, self.cpu_s = {name: [] for name in CALLS}, 0, 0.0
        self._journal_before = size

    @staticmethod
    def print_head() -> None:
        cells = "  ".join(f"{name + ' p50 / p99 / max ms':>24}" for name in CALLS)
        print(f"{'trials':>9} {'trials/s':>8} {'per CPU s':>9}  {cells} {'MiB':>7} {'opens':>6} {'journal':>7}")


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
    before = len(trials.trials)
    sampler = trials.arm.sweep_config.sampler.name
    asked = f"{num_workers} workers, {before:,} trials before, {trials.planned - before:,} to go, {sampler}"
    print(f"{asked}; load {os.getloadavg()[0]:.1f}")
    times.print_head()
    printed = before
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


def measure_ray(sweep: SweepFolder, num_actors: int) -> None:
    """Simulates a sweep with Ray actors as workers, and prints the durations of their calls with waiting."""
    planned = sweep.definition.arms[0].trials
    sweep.close()
    with start_local_cluster(sweep.path):
        import ray  # noqa: PLC0415 (reads the environment once, so it must be set before)

        from lorasweep.sweep.workers.ray_workers import (  # noqa: PLC0415
            ControllerActor,
            ControllerClient,
            WorkerContext,
            code_versions,
        )

        context = WorkerContext(current_folder=Path.cwd(), sweep_path=sweep.path, code=code_versions())
        actor = ray.remote(ControllerActor).options(num_cpus=0).remote(context, session="bench")
        controller = ControllerClient(actor)
        controller.is_over()
        began = time.perf_counter()
        make: Any = ray.remote(PlayingWorker)
        players = [make.options(num_cpus=0).remote(actor, f"bench-{number}") for number in range(num_actors)]
        ray.get([player.get_ready.remote() for player in players])
        started = time.perf_counter()
        found = ray.get([player.play.remote() for player in players])
        took = time.perf_counter() - started
        seconds = {name: [s for each in found for s in each[name]] for name in CALLS}
        print(f"{num_actors} Ray actors ready in {started - began:.0f} s; load {os.getloadavg()[0]:.1f}")
        calls = sum(map(len, seconds.values()))
        print(f"{planned:,} trials in {took:.0f} s: {planned / took:.1f} trials/s, {calls / took:.0f} calls/s")
        for name in CALLS:
            print(f"{name:>8} p50 / p99 / max ms, waiting included: {describe_ms(seconds[name])}")
        controller.finish()
        controller.close()


class PlayingWorker:
    """A worker that trains nothing, in a separate process."""

    def __init__(self, controller: Any, name: str) -> None:
        from lorasweep.sweep.workers.ray_workers import ControllerClient  # noqa: PLC0415

        self._controller = ControllerClient(controller)
        self._worker = TrainingWorker(name)

    def get_ready(self) -> None:
        """Returns once the process has started."""

    def play(self) -> dict[str, list[float]]:
        """Calls the controller until no trial is left, and returns the seconds of each call."""
        seconds: dict[str, list[float]] = {name: [] for name in CALLS}

        def timed(kind: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            answer = call(*args, **kwargs)
            seconds[kind].append(time.perf_counter() - began)
            return answer

        while True:
            self._worker.advance(self._controller, timed)
            if self._worker.assignment is None and self._controller.is_over():
                return seconds


if __name__ == "__main__":
    main()
