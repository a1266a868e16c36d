"""How long the controller takes to hand out a trial, to take a report and a result, by how many trials an arm has.

Fills an arm's study with made-up complete trials, then hands out a hundred more with nothing trained in between:

    python benchmarks/bench_controller.py --trials 0 1000 10000 --samplers tpe random
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import yaml
from optuna.trial import TrialState, create_trial

from lorasweep.record import RunRecord
from lorasweep.sweep import Controller, SweepFolder, create_sweep, read_definition, reopen_sweep
from lorasweep.sweep.controller.rows import FUNCTION_ATTRIBUTE, SCORE_ATTRIBUTE, TURN_ATTRIBUTE

NUM_MEASURED = 100
STEPS = (25, 75, 150)
SPACE = {"method.rank": [1, 2, 4, 8, 16, 32, 64], "optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[0, 1000, 10_000])
    parser.add_argument("--samplers", nargs="+", default=["tpe", "random"])
    asked = parser.parse_args()
    print(f"median (slowest) of {NUM_MEASURED} trials, ms")
    print(f"{'sampler':<8} {'trials':>7} {'take':>16} {'report':>16} {'tell':>16} {'open':>8}")
    for sampler in asked.samplers:
        for num_trials in asked.trials:
            with tempfile.TemporaryDirectory() as folder:
                measure(Path(folder), sampler, num_trials)


def measure(folder: Path, sampler: str, num_trials: int) -> None:
    """Prints a row."""
    sweep = make_sweep(folder, sampler, num_trials)
    fill(sweep, num_trials)
    sweep.close()
    began = time.perf_counter()
    sweep = reopen_sweep(folder / "sweep")
    controller = Controller(sweep, run_ended=lambda *_: None)
    opened = 1e3 * (time.perf_counter() - began)
    times = run_trials(controller)
    cells = " ".join(f"{statistics.median(t):>7.1f} ({max(t):>6.1f})" for t in times)
    print(f"{sampler:<8} {num_trials:>7,} {cells} {opened:>8.0f}", flush=True)
    sweep.close()


def run_trials(controller: Controller) -> tuple[list[float], list[float], list[float]]:
    """Returns the milliseconds of each `take`, `report` and `tell`."""
    takes, reports, tells = [], [], []
    for number in range(NUM_MEASURED):
        assignment, took = timed(controller.take)
        takes.append(took)
        record = RunRecord(
            status="complete", config=asdict(assignment.config), metric="bits_per_byte", direction="minimize"
        )
        for step in STEPS:
            record.best = {"bits_per_byte": 1.0 + number / 1000 + 1 / step, "step": step}
            value = record.best["bits_per_byte"]
            goes_on, took = timed(partial(controller.report, [(assignment, step, value)]))
            reports.append(took)
            if not goes_on[0]:
                record.status = "paused"
                break
        tells.append(timed(partial(controller.tell, assignment, record))[1])
    return takes, reports, tells


def timed(action: Callable) -> tuple:
    """Returns what an action gives, and the milliseconds that it took."""
    began = time.perf_counter()
    result = action()
    return result, 1e3 * (time.perf_counter() - began)


def make_sweep(folder: Path, sampler: str, num_trials: int) -> SweepFolder:
    """Makes the folder of a sweep of one arm."""
    file = folder / "many.yaml"
    settings = {"method": "lora"}
    arm = {"settings": settings, "space": SPACE, "trials": num_trials + 2 * NUM_MEASURED}
    content = {"name": "many", "settings": {"sampler": sampler, "confirm.seeds": 0}, "arms": {"lora": arm}}
    file.write_text(yaml.safe_dump(content))
    definition = read_definition(file, [])
    configs = {arm.name: next(arm.corners()) for arm in definition.arms}
    return create_sweep(definition, folder / "sweep", configs=configs, metric="bits_per_byte")


def fill(sweep: SweepFolder, num_trials: int) -> None:
    """Adds trials that are complete: the score is best at a rate of 0.01 and hardly depends on the rank."""
    (arm,) = sweep.definition.arms
    study, drawn = sweep.open_study(arm.name), random.Random(0)
    for number in range(num_trials):
        rank, lr = drawn.choice(SPACE["method.rank"]), 10 ** drawn.uniform(-4, -1)
        score = 1.2 + 0.1 * abs(math.log10(lr) + 2) + 0.01 / rank
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=score,
                params={"method.rank": rank, "optim.lr": lr},
                distributions=arm.space,
                intermediate_values={step: score + 1 / step for step in STEPS},
                user_attrs={
                    TURN_ATTRIBUTE: {"order": number, "passed": [25], "promoted": []},
                    FUNCTION_ATTRIBUTE: f"{number:016x}",
                    SCORE_ATTRIBUTE: score,
                },
            )
        )


if __name__ == "__main__":
    main()
