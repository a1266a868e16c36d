"""How long the driver takes to ask for a trial, report and tell it, by how many trials the study already has.

Fills an arm's study in the journal with made-up trials, then runs a hundred more through the worker's own code
(`Trials`) with no training between ask and tell:

    python benchmarks/bench_many_trials.py --trials 0 1000 10000 --samplers tpe random
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import yaml

from lorasweep.record import RunRecord, RunStatus
from lorasweep.sweep import Arm, SweepFolder, create_sweep, read_definition, reopen_sweep
from lorasweep.sweep.rows import FUNCTION_ATTRIBUTE, SCORE_ATTRIBUTE
from lorasweep.sweep.stages import Search
from lorasweep.sweep.trials import Trials
from lorasweep.sweep.workers import Colleagues, Registration

MEASURED = 100
LEASE_S = 120
EVALUATIONS = (50, 100, 150)
SPACE = {"method.rank": [1, 2, 4, 8, 16, 32, 64], "optim.lr": {"low": 1e-4, "high": 1e-1, "log": True}}


class Silent:
    """An observer that hears nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Takes whatever there is to tell."""
        return lambda *_, **__: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[0, 1000, 10_000])
    parser.add_argument("--samplers", nargs="+", default=["tpe", "random"])
    asked = parser.parse_args()
    print(f"median (slowest) of {MEASURED} trials, ms")
    print(f"{'sampler':<8} {'trials':>7} {'ask':>16} {'report':>16} {'tell':>16} {'reopen':>8}")
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
    reopened = 1e3 * (time.perf_counter() - began)
    times = run_trials(sweep)
    cells = " ".join(f"{statistics.median(t):>7.1f} ({max(t):>6.1f})" for t in times)
    print(f"{sampler:<8} {num_trials:>7,} {cells} {reopened:>8.0f}", flush=True)
    sweep.close()


def run_trials(sweep: SweepFolder) -> tuple[list[float], list[float], list[float]]:
    """Returns the milliseconds of each ask, report and tell."""
    (arm,) = sweep.definition.arms
    asks, reports, tells = [], [], []
    with Registration(sweep.path, lease_s=LEASE_S) as worker:
        trials = Trials(
            sweep,
            Search(sweep),
            worker=worker,
            colleagues=Colleagues(sweep.path, lease_s=LEASE_S),
            observer=Silent(),
            run_ended=lambda record, folder, params: None,
        )
        for _ in range(MEASURED):
            run_trial(trials, arm, asks, reports, tells)
    return asks, reports, tells


def run_trial(trials: Trials, arm: Arm, asks: list[float], reports: list[float], tells: list[float]) -> None:
    """Adds the milliseconds that one trial takes."""
    ask_ms, opened = timed(trials.take, [arm])
    if opened is not None:
        asks.append(ask_ms)
        best, pruned = float("inf"), False
        for step in EVALUATIONS:
            best = min(best, draw_score(opened.params, step))
            report_ms, pruned = timed(trials.report, opened, step, best)
            reports.append(report_ms)
            if pruned:
                break
        status: RunStatus = "pruned" if pruned else "complete"
        kept = {"bits_per_byte": best, "step": 150}
        record = RunRecord(status=status, config={}, metric="bits_per_byte", direction="minimize", best=kept)
        tells.append(timed(trials.tell, opened, record)[0])


def timed(action: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Returns the milliseconds that something took, and what it gave."""
    began = time.perf_counter()
    given = action(*arguments)
    return 1e3 * (time.perf_counter() - began), given


def make_sweep(folder: Path, sampler: str, num_trials: int) -> SweepFolder:
    """Begins a sweep of one arm."""
    arm = {"settings": {"method": "lora"}, "space": SPACE, "trials": num_trials + MEASURED}
    settings = {"sampler": sampler, "pruner": "median", "confirm.seeds": 0}
    (folder / "many.yaml").write_text(yaml.safe_dump({"name": "many", "settings": settings, "arms": {"lora": arm}}))
    definition = read_definition(folder / "many.yaml", [])
    configs = {arm.name: next(arm.corners()) for arm in definition.arms}
    return create_sweep(definition, folder / "sweep", configs=configs, metric="bits_per_byte")


def fill(sweep: SweepFolder, num_trials: int) -> None:
    """Puts trials that ended into the study."""
    (arm,) = sweep.definition.arms
    drawn = random.Random(0)
    for number in range(num_trials):
        params = {"method.rank": drawn.choice(SPACE["method.rank"]), "optim.lr": 10 ** drawn.uniform(-4, -1)}
        values = {step: draw_score(params, step) for step in EVALUATIONS}
        sweep.studies[arm.name].add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=arm.space,
                value=min(values.values()),
                intermediate_values=values,
                user_attrs={FUNCTION_ATTRIBUTE: str(number), SCORE_ATTRIBUTE: min(values.values())},
            )
        )


def draw_score(params: Mapping[str, Any], step: int) -> float:
    """A made-up score with its best at rank 64 and a rate of 1e-2."""
    off = abs(-2 - math.log10(params["optim.lr"]))
    return 1.6 + 0.1 / params["method.rank"] + 0.2 * off + 10 / step


if __name__ == "__main__":
    main()
