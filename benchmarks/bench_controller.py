"""Measures how many trials per second the controller hands out and takes back, with many workers that train nothing.

One loop simulates all workers: it picks a worker at random (seeded), makes this worker's next call (`take`, `report` at
each evaluation, `tell`), and times the call. Every worker always has a trial.

    python benchmarks/bench_controller.py --workers 1000 --trials 5000 --sampler tpe

With `--ray N` the workers are N Ray actors on this machine, which call the controller's actor as often as they can:

    python benchmarks/bench_controller.py --ray 64 --trials 2000 --sampler tpe

With `--occupancy` the real workers train whole sweeps with stored learning curves, on a clock that is computed. It
prints the share of the slots of packs that trained, and the makespan. Both are the same in each run:

    python benchmarks/bench_controller.py --occupancy --seeds 8
"""

from __future__ import annotations

import argparse
import csv
import heapq
import math
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import yaml
from optuna.trial import TrialState, create_trial

import lorasweep.sweep.workers.worker as worker_file
from lorasweep.config.data import get_built_in_metric
from lorasweep.config.run import RunConfig
from lorasweep.record import RunRecord, SweepRecord, measure_stage_occupancy, read_run, write_record
from lorasweep.sweep.controller.arm_trials import TRIAL_ATTRIBUTE
from lorasweep.sweep.controller.controller import Assignment, Controller
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.lifecycle import create_sweep, reopen_sweep
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.workers.ray_cluster import start_local_cluster
from lorasweep.training.packs.size import PackSize
from lorasweep.training.packs.slot_run import NextRun, OnPackEvaluation, RunRequest, SlotEvaluation
from lorasweep.training.run_log import RunFolder
from lorasweep.training.telemetry import Telemetry

SPACE = {"method.rank": [1, 2, 4, 8, 16, 32, 64], "optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
METRIC = "bits_per_byte"
CALLS = ("take", "report", "tell")
PACK_SLOTS = 8
STEP_OVERHEAD = 2.0
"""Time of a step beside its slots, as a multiple of one slot's time.

`bench_pack.py` measured 50.7, 33.0, 24.4 and 20.2 ms per trial-step of `tiny` in bf16 with 1, 2, 4 and 8 slots. These
are 35 ms + 16 ms per slot; MiniLM-L6 gives 37 ms + 18 ms."""
FULL_SLOT_TIME = 1.5
"""Time of a step of full fine-tuning beside the overhead: it also computes the gradients of the weights."""
POLL_TIME = 20.0
"""Time until a worker asks again after it got no trial. Two steps of a full pack."""
CURVES = Path(__file__).parent / "curves"
LR = {"optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
FROZEN_SCORE = 1.84
DIVERGED_SCORE = 100.0
"""A score that is worse than every other, because the stored curves have NaN there."""


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
    parser.add_argument("--occupancy", action="store_true", help="simulate whole sweeps, from search to confirm")
    parser.add_argument("--seeds", type=int, default=8, help="with --occupancy: number of sweeps per row")
    parser.add_argument("--folder", type=Path, help="parent of the sweep's folder; default: a temporary folder")
    asked = parser.parse_args()
    if asked.occupancy:
        measure_occupancy(num_seeds=asked.seeds)
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        sweep = make_sweep(Path(folder), asked.sampler, asked.filled + asked.trials)
        fill(sweep, asked.filled)
        if asked.ray:
            measure_ray(sweep, asked.ray)
            return
        simulate(sweep, asked.workers, every=asked.every or asked.trials)
        measure_restart(sweep.path)


def make_sweep(folder: Path, sampler: str, num_trials: int) -> SweepFolder:
    """Creates the folder of a sweep with one arm and the default rungs and evaluations."""
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
                user_attrs={
                    TRIAL_ATTRIBUTE: {"state": "complete", "value": score, "order": number, "passed": [25, 75]}
                },
            )
        )


def value_at(assignment: Assignment, step: int) -> float:
    """Returns an invented score of a trial."""
    return score_of(assignment.params, assignment.number, step)


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

    def advance(self, controller: Any, timed: Callable[..., Any], paused_at: dict[str, int]) -> None:
        """Makes one call; `paused_at` holds the step of each paused run, as its checkpoint would."""
        if self.assignment is None:
            self.requests += 1
            self.assignment = timed("take", controller.take, worker=self.name, request=self.requests)
            if self.assignment is not None:
                trainer = self.assignment.config.trainer
                done = paused_at.get(self.assignment.run_folder.path.name, 0)
                self.steps = list(
                    range(done + trainer.eval_every_steps, trainer.max_steps + 1, trainer.eval_every_steps)
                )
            return
        step = self.steps.pop(0)
        value = value_at(self.assignment, step)
        (goes_on,) = timed("report", controller.report, [(self.assignment, step, value)])
        if self.steps and goes_on:
            return
        self._end(controller, timed, step, value, paused_at)

    def _end(
        self, controller: Any, timed: Callable[..., Any], step: int, value: float, paused_at: dict[str, int]
    ) -> None:
        assignment = self.assignment
        assert assignment is not None
        record = RunRecord(
            status="paused" if self.steps else "complete",
            config=asdict(assignment.config),
            metric=METRIC,
            direction="minimize",
            best={METRIC: value, "step": step},
            steps_done=step,
        )
        if self.steps:  # the end of the search reads the records of paused runs
            paused_at[assignment.run_folder.path.name] = step
            write_record(record, assignment.run_folder.path)
        timed("tell", controller.tell, assignment, record)
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
    drawn, paused_at, times = random.Random(0), {}, Times(sweep.path)
    trials = controller.search.arms["lora"]
    before = len(trials.trials)
    (arm,) = sweep.record.arms
    asked = f"{num_workers} workers, {before:,} trials before, {trials.planned - before:,} to go, {arm.sampler}"
    print(f"{asked}; load {os.getloadavg()[0]:.1f}")
    times.print_head()
    printed = before
    while not controller.is_over():
        drawn.choice(workers).advance(controller, times, paused_at)
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
        players = [
            make.options(num_cpus=0).remote(actor, f"bench-{number}", sweep.path / "runs")
            for number in range(num_actors)
        ]
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


class PausedRuns(dict[str, int]):
    """The step of each paused run, read from its record, because another process may have paused it."""

    def __init__(self, runs: Path) -> None:
        super().__init__()
        self._runs = runs

    def get(self, name: str, default: Any = 0) -> Any:
        """Returns the step, or the default if the run has not started."""
        return read_run(self._runs / name).steps_done if (self._runs / name).is_dir() else default


class PlayingWorker:
    """A worker that trains nothing, in a separate process."""

    def __init__(self, controller: Any, name: str, runs: Path) -> None:
        from lorasweep.sweep.workers.ray_workers import ControllerClient  # noqa: PLC0415

        self._controller = ControllerClient(controller)
        self._worker = TrainingWorker(name)
        self._paused = PausedRuns(runs)

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
            self._worker.advance(self._controller, timed, self._paused)
            if self._worker.assignment is None and self._controller.is_over():
                return seconds


def list_occupancy_sweeps() -> dict[str, dict[str, Any]]:
    """Returns the content of the simulated sweeps by name, all with the default rungs and stages."""

    def lora(num_trials: int, rank: int = 8) -> dict[str, Any]:
        return {
            "settings": {"method": "lora", "method.rank": rank},
            "space": {**LR, "method.alpha": [4, 16, 64]},
            "trials": num_trials,
        }

    full = {"settings": {"method": "full"}, "space": LR}
    ranks = {f"lora-rank{rank}": lora(8, rank) for rank in (1, 4, 16, 64)}
    arms: dict[str, dict[str, Any]] = {
        "quickstart: lora 12, full 12": {"lora": lora(12), "full": {**full, "trials": 12}},
        "lora 8": {"lora": lora(8)},
        "lora 24": {"lora": lora(24)},
        "4 ranks × 8": ranks,
        "4 ranks × 8, full 8": {**ranks, "full": {**full, "trials": 8}},
    }
    settings = {"trainer.max_steps": 120, "trainer.eval_every_steps": 10, "sampler": "tpe"}
    frozen = {"frozen": {"settings": {"method": "frozen"}}}
    return {
        name: {"name": "occupancy", "settings": settings, "arms": {**frozen, **content}}
        for name, content in arms.items()
    }


def measure_occupancy(*, num_seeds: int) -> None:
    """Prints a table in Markdown with a row for each sweep and number of workers; means over seeds."""
    print("| sweep | workers | slots in use: search, confirm | makespan, steps of a full pack |")
    print("|---|--:|---|--:|")
    full_step = STEP_OVERHEAD + PACK_SLOTS
    for name, content in list_occupancy_sweeps().items():
        for num_workers in (1, 2, 4):
            sweeps = [SimulatedSweep(content, num_workers=num_workers, seed=seed).run() for seed in range(num_seeds)]
            occupancies = [measure_stage_occupancy(record) for record, _ in sweeps]
            cells = [f"{statistics.fmean(each[stage] for each in occupancies):.0%}" for stage in ("search", "confirm")]
            makespan = statistics.fmean(time for _, time in sweeps) / full_step
            print(f"| {name} | {num_workers} | {', '.join(cells)} | {makespan:.0f} |", flush=True)


class VirtualClock:
    """Lets threads run one at a time, each until it sleeps. The thread that wakes up first is next."""

    def __init__(self, num_threads: int) -> None:
        self.now = 0.0
        self._sleeping = [(0.0, thread) for thread in range(num_threads)]
        self._turns = [threading.Event() for _ in range(num_threads)]

    def wake_next(self) -> None:
        """Lets the next thread run. The caller must end or wait."""
        if self._sleeping:
            self.now, thread = heapq.heappop(self._sleeping)
            self._turns[thread].set()

    def wait(self, thread: int) -> None:
        """Waits until it is this thread's turn."""
        self._turns[thread].wait()
        self._turns[thread].clear()

    def sleep(self, thread: int, duration: float) -> None:
        heapq.heappush(self._sleeping, (self.now + duration, thread))
        self.wake_next()
        self.wait(thread)


class SimulatedSweep:
    """A sweep whose workers train nothing: a run's scores are a stored curve, and a step takes a computed time."""

    def __init__(self, content: Mapping[str, Any], *, num_workers: int, seed: int) -> None:
        self._definition = read_definition(content, {"sweep.seed": seed})
        self._clock = VirtualClock(num_workers)
        self._num_workers = num_workers
        self._thread = threading.local()
        self._runs: dict[Path, RunRecord] = {}
        """The records of all runs that trained, as their checkpoints would have them."""
        self._curves = {method: read_curves(method, seed=seed % 3) for method in ("lora", "full")}
        self._order = {
            arm.name: random.Random(f"{seed}/{arm.name}").sample(range(24), 24) for arm in self._definition.arms
        }

    def run(self) -> tuple[SweepRecord, float]:
        """Returns the sweep's record and its makespan, in times of one slot."""
        replaced = {
            "train_pack": self.train_pack,
            "train_run": self.train_run,
            "score_run": self.score_run,
            "choose_pack_size": lambda config, *, inputs, trials_left: PackSize(min(PACK_SLOTS, trials_left), ""),
            "time": SimpleNamespace(sleep=lambda _: self._sleep(POLL_TIME)),
        }
        with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(worker_file, **replaced):
            sweep = create_sweep(self._definition, Path(folder) / "sweep", metric=get_built_in_metric(METRIC))
            controller = Controller(sweep, session="worker")
            threads = [
                threading.Thread(target=self._work, args=(number, sweep, controller))
                for number in range(self._num_workers)
            ]
            for thread in threads:
                thread.start()
            self._clock.wake_next()
            for thread in threads:
                thread.join()
            assert controller.finish()
            sweep.close()
        return sweep.record, self._clock.now

    def _work(self, number: int, sweep: SweepFolder, controller: Controller) -> None:
        self._thread.number = number
        inputs: Any = SimpleNamespace(
            splits=SimpleNamespace(test=lambda: SimpleNamespace(notes=())), telemetry=Telemetry()
        )
        inputs.load = lambda config: inputs
        self._clock.wait(number)
        try:
            worker_file.Worker(
                path=sweep.path,
                definition=self._definition,
                controller=controller,
                metric=METRIC,
                inputs_cache=inputs,
                stop_requested=lambda: False,
                name=f"worker-{number}" if self._num_workers > 1 else "",
                num_workers=self._num_workers,
            ).run()
        finally:
            self._clock.wake_next()

    def _sleep(self, duration: float) -> None:
        self._clock.sleep(self._thread.number, duration)

    def train_pack(
        self,
        requests: Sequence[RunRequest],
        *,
        slots: int,
        next_run: NextRun,
        on_evaluation: OnPackEvaluation,
        **_: Any,
    ) -> bool:
        """Makes the calls of the real `train_pack`."""
        running = list(requests)
        while running:
            num, trainer = len(running), running[0].config.trainer
            self._sleep(trainer.eval_every_steps * (STEP_OVERHEAD + num))
            records = [self._advance(request.config, request.run_folder, slot_steps=slots / num) for request in running]
            evaluations = [
                SlotEvaluation(request=request, step=record.steps_done, metrics=record.last)
                for request, record in zip(running, records, strict=True)
            ]
            answers = on_evaluation(evaluations)
            kept = []
            for request, record, goes_on in zip(running, records, answers, strict=True):
                if record.steps_done < trainer.max_steps and goes_on:
                    kept.append(request)
                else:
                    request.on_end(self._close(record, request.run_folder))
            while len(kept) < slots and (refill := next_run()) is not None:
                kept.append(refill)
            running = kept
        return True

    def train_run(
        self,
        config: RunConfig,
        folder: RunFolder,
        *,
        on_evaluation: Callable[[int, Mapping[str, float]], bool],
        **_: Any,
    ) -> RunRecord:
        """Makes the calls of the real `train_run`."""
        goes_on = True
        record = self._advance(config, folder) if config.method.name == "frozen" else None
        while record is None or (record.steps_done < config.trainer.max_steps and goes_on):
            self._sleep(config.trainer.eval_every_steps * (STEP_OVERHEAD + FULL_SLOT_TIME))
            record = self._advance(config, folder)
            goes_on = on_evaluation(record.steps_done, record.last)
        return self._close(record, folder)

    def score_run(self, path: Path, **_: Any) -> RunRecord:
        """Returns the record of a run with its validation score as its test score."""
        record = self._runs[path]
        record.test = {METRIC: record.last[METRIC]}
        return record

    def _advance(self, config: RunConfig, folder: RunFolder, *, slot_steps: float = 0.0) -> RunRecord:
        """Trains a run up to its next evaluation; in a pack, each step takes `slot_steps` of the planned slots."""
        is_frozen, trainer = config.method.name == "frozen", config.trainer
        record = self._runs.setdefault(
            folder.path,
            RunRecord(
                status="running",
                config=asdict(config),
                metric=METRIC,
                direction="minimize",
                pack={"slot_steps": 0.0} if slot_steps else None,
            ),
        )
        if is_frozen:
            record.steps_done, value = trainer.max_steps, FROZEN_SCORE
        else:
            record.steps_done += trainer.eval_every_steps
            trial = self._order[str(folder.arm)][(folder.trial or 0) % 24]
            value = self._curves[config.method.name][trial][round(12 * record.steps_done / trainer.max_steps)]
        if record.pack:
            record.pack["slot_steps"] += slot_steps * trainer.eval_every_steps
        record.last = {METRIC: value}
        record.best = {METRIC: min(value, record.best.get(METRIC, math.inf)), "step": record.steps_done}
        return record

    def _close(self, record: RunRecord, folder: RunFolder) -> RunRecord:
        is_complete = record.steps_done >= record.config["trainer"]["max_steps"]
        record.status = "complete" if is_complete else "paused"
        folder.path.mkdir(parents=True, exist_ok=True)
        write_record(record, folder.path)  # the end of the search reads the records of paused runs
        return record


def read_curves(method: str, *, seed: int) -> list[dict[int, float]]:
    """Returns the scores of 24 stored trials at each twelfth of a run."""
    curves: dict[int, dict[int, float]] = defaultdict(dict)
    with (CURVES / f"stdlib_docs_{method}_seed{seed}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["evaluation"] != "0":
                value = float(row["value"])
                curves[int(row["trial"])][int(row["evaluation"])] = value if math.isfinite(value) else DIVERGED_SCORE
    return [curves[trial] for trial in sorted(curves)]


if __name__ == "__main__":
    main()
