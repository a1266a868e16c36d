"""Replays samplers on stored complete results (`benchmarks/curves/`): trials until one is nearly the best.

    python benchmarks/bench_proposals.py [--json] [--draws 100] [--gp-draws 30] [--rungs]

Tables: the grid of rank × α/r × learning rate of LoRA (`grid_stdlib_docs.csv`), and full fine-tuning's learning rate
on two data sets and three seeds. The value of a proposed learning rate is interpolated linearly in the logarithm of
the rate, between the neighbours with the same rank and α/r. LoRA's other curves have too few points to interpolate:
24 in three dimensions, with a median error of 7 to 28 % of the gain if each is predicted from the rest (full: at most
1.2 %).

A trial's value is its best evaluation, as in the product. The gain is the frozen base minus the best of the table.
Regret is how much the best of n trials is worse than the best of the table, as a share of the gain; a trial is within
1 % if its regret is at most 1 %. No trial is stopped early. Trials are proposed as in a sweep: packs of 4, whose
members know only the results of earlier packs, and with an adaptive sampler at most half of the trials before the
first result. With `--rungs` the controller decides on the grid: packs of 8, the default rungs, and a sampler that sees
values of trials that are not complete.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from lorasweep.config.compose import compose_sweep
from lorasweep.config.sweep import FixedSampler, ModelBasedSampler, SamplerConfig
from lorasweep.sweep.controller.arm_trials import ArmTrials
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.controller.stages import FIRST_TRIALS_FRACTION
from lorasweep.sweep.controller.stopping_rules import Halving
from lorasweep.sweep.controller.trial import Trial
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.space import Space

CURVES = Path(__file__).parent / "curves"
WITHIN = {"1": 0.01, "5": 0.05}
"""Largest regret of a trial that counts as good enough, by its name in percent."""
NUM_SLOTS = 4
PACK_SLOTS = 8
"""Trials that train together in a search with rungs."""
FIRST_PART_FRACTION = 0.5
"""Share of an arm's trials that an adaptive sampler proposes before the first result."""
GRID_TRIALS = (8, 12, 16, 24)
LR_TRIALS = (8,)
"""Number of trials on tables with only a learning rate: one dimension needs no more."""
GRID = CURVES / "grid_stdlib_docs.csv"
LR_TASKS = ("stdlib_docs_full", "stdlib_code_full")
RANK, RATIO, LR = "method.rank", "method.alpha_over_rank", "optim.lr"

Setting = tuple[float, ...]
"""Rank and α/r; empty where only the learning rate is searched."""
Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Complete results, interpolated between learning rates; lower is better."""

    name: str
    lines: Mapping[Setting, tuple[Matrix, Matrix]]
    """Per setting the logarithms of its learning rates, ascending, and their values."""
    frozen: float

    @property
    def best(self) -> float:
        """Best value of the table. An interpolated value is never below both its neighbours."""
        return min(float(values.min()) for _, values in self.lines.values())

    @property
    def lr_range(self) -> tuple[float, float]:
        """Lowest and highest learning rate."""
        rates = next(iter(self.lines.values()))[0]
        return math.exp(rates[0]), math.exp(rates[-1])

    def read(self, params: Mapping[str, Any]) -> float:
        """Returns the value of a trial."""
        setting = tuple(float(params[key]) for key in (RANK, RATIO) if key in params)
        rates, values = self.lines[setting]
        return float(np.interp(math.log(params[LR]), rates, values))

    def regret(self, value: float) -> float:
        """Returns how much worse a value is than the best value, as a share of the gain."""
        return (value - self.best) / (self.frozen - self.best)

    def space(self, *, ordered: bool = True, lr_range: tuple[float, float] | None = None) -> Space:
        """Returns the space that is searched; unordered choices are texts, which samplers do not order."""
        low, high = lr_range or self.lr_range
        space: Space = {LR: FloatDistribution(low, high, log=True)}
        for place, key in enumerate((RANK, RATIO)):
            if values := sorted({setting[place] for setting in self.lines if setting}):
                space[key] = CategoricalDistribution([value if ordered else str(value) for value in values])
        return space

    def of_rank(self, rank: float) -> Table:
        """Returns the rows of one rank, with the best value of this rank."""
        lines = {setting: line for setting, line in self.lines.items() if setting[0] == rank}
        return replace(self, name=f"{self.name}, rank {rank:g}", lines=lines)


def read_table(path: Path) -> Table:
    """Returns the table of a file; a trial's value is its best evaluation."""
    best: dict[tuple[Setting, float], float] = {}
    frozen = math.nan
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["evaluation"] == "0":
                frozen = float(row["value"])
                continue
            setting: Setting = (float(row["rank"]), float(row["alpha"]) / float(row["rank"])) if row["rank"] else ()
            key = setting, math.log(float(row["lr"]))
            best[key] = min(best.get(key, math.inf), float(row["value"]))
    points: dict[Setting, list[tuple[float, float]]] = defaultdict(list)
    for (setting, rate), value in sorted(best.items()):
        points[setting].append((rate, value))
    lines = {setting: (np.array(line)[:, 0], np.array(line)[:, 1]) for setting, line in points.items()}
    return Table(name=path.stem, lines=lines, frozen=frozen)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How trials are proposed."""

    name: str
    sampler: str = "tpe"
    startup_fraction: float | None = None
    """Share of the trials that are Sobol points; None is the product's default."""
    ordered: bool = True
    optuna_startup: int | None = None
    """Number of random trials of Optuna's TPE; None uses the product's `propose`."""
    slots: int = NUM_SLOTS

    def build(self, n: int) -> SamplerConfig:
        """Returns the product's settings of the sampler."""
        if self.sampler not in ("tpe", "gp"):
            return FixedSampler(name=self.sampler)  # type: ignore[arg-type]
        startup = None if self.startup_fraction is None else math.ceil(self.startup_fraction * n)
        return ModelBasedSampler(name=self.sampler, startup_trials=startup)  # type: ignore[arg-type]


WAYS = (
    Way(name="random", sampler="random"),
    Way(name="qmc", sampler="qmc"),
    Way(name="tpe of Optuna, 10 random, packs of 8", optuna_startup=10, ordered=False, slots=8),
    Way(name="tpe of Optuna, 5 random, packs of 8", optuna_startup=5, ordered=False, slots=8),
    Way(name="tpe, 1/2 Sobol"),
    Way(name="tpe, 1/4 Sobol", startup_fraction=1 / 4),
    Way(name="tpe, 1/2 Sobol, unordered", ordered=False),
    Way(name="gp, 1/2 Sobol", sampler="gp"),
    Way(name="gp, 1/4 Sobol", sampler="gp", startup_fraction=1 / 4),
    Way(name="gp, 1/2 Sobol, unordered", sampler="gp", ordered=False),
)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The trials of one arm in their order."""

    params: tuple[Mapping[str, Any], ...]
    values: tuple[float, ...]
    known: tuple[int, ...]
    """Number of results when each trial was proposed."""

    @property
    def best_lr(self) -> float:
        """Learning rate of the best trial."""
        return float(self.params[self.values.index(min(self.values))][LR])


Ask = Callable[[int, Sequence[Mapping[str, Any]], Sequence[float]], Mapping[str, Any]]
"""Returns the parameters of a trial from its number, the earlier trials' parameters, and the ended trials' values."""


def run_arm(table: Table, ask: Ask, *, n: int, slots: int = NUM_SLOTS, first_part: int | None = None) -> Replay:
    """Proposes n trials in packs, at most `first_part` before the first result, and interpolates their values."""
    params: list[Mapping[str, Any]] = []
    values: list[float] = []
    known: list[int] = []
    while len(params) < n:
        limit = n if values or first_part is None else first_part
        for _ in range(min(slots, limit - len(params))):
            known.append(len(values))
            params.append(ask(len(params), params, values))
        values += [table.read(each) for each in params[len(values) :]]
    return Replay(params=tuple(params), values=tuple(values), known=tuple(known))


def replay(table: Table, way: Way, *, n: int, seed: int) -> Replay:
    """Returns one search of a table."""
    learns = way.sampler in ("tpe", "gp") and way.optuna_startup is None
    first_part = math.ceil(FIRST_PART_FRACTION * n) if learns else None
    ask = ask_optuna(table, way, seed=seed) if way.optuna_startup else ask_product(table, way, n=n, seed=seed)
    return run_arm(table, ask, n=n, slots=way.slots, first_part=first_part)


def ask_product(table: Table, way: Way, *, n: int, seed: int, first_lr: tuple[float, float] | None = None) -> Ask:
    """Returns a caller of the product's `propose`; with `first_lr`, the first half are Sobol points of that range."""
    space, sampler = table.space(ordered=way.ordered), way.build(n)
    sweep_config = compose_sweep({"sweep.seed": seed})

    def ask(number: int, params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Mapping[str, Any]:
        history = show_history(space, params, values)
        is_first = first_lr is not None and number < math.ceil(FIRST_PART_FRACTION * n)
        arm = Arm(
            name=table.name,
            settings={},
            space=table.space(lr_range=first_lr) if is_first else space,
            trials=n,
            sweep_config=replace(sweep_config, sampler=FixedSampler(name="qmc") if is_first else sampler),
        )
        return propose(arm, history, number=number, direction="minimize")[0]

    return ask


def show_history(space: Space, params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> list[FrozenTrial]:
    """Returns trials as Optuna has them: those without a value are running."""
    history = [
        create_trial(value=value, params=dict(each), distributions=space)
        for each, value in zip(params, values, strict=False)
    ]
    running = params[len(values) :]
    return history + [create_trial(state=TrialState.RUNNING, params=dict(e), distributions=space) for e in running]


def ask_optuna(table: Table, way: Way, *, seed: int) -> Ask:
    """Returns a function that asks Optuna's TPE, with a separate study."""
    space = table.space(ordered=way.ordered)
    startup = way.optuna_startup or 0
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed))

    def ask(number: int, params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Mapping[str, Any]:
        told = sum(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))
        for ended in range(told, len(values)):
            study.tell(ended, values[ended])
        return study.ask(space).params

    return ask


def read_grid_curves() -> dict[int, Table]:
    """Returns the grid's values after each recorded twelfth of a run."""
    by_evaluation: dict[int, dict[Setting, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with GRID.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["rank"]:
                setting = float(row["rank"]), float(row["alpha"]) / float(row["rank"])
                point = math.log(float(row["lr"])), float(row["value"])
                by_evaluation[int(row["evaluation"])][setting].append(point)
    frozen = read_table(GRID).frozen
    return {
        evaluation: Table(
            name=GRID.stem,
            lines={
                setting: (np.array(sorted(line))[:, 0], np.array(sorted(line))[:, 1]) for setting, line in lines.items()
            },
            frozen=frozen,
        )
        for evaluation, lines in by_evaluation.items()
    }


def search_with_rungs(curves: Mapping[int, Table], sampler: str, *, n: int, seed: int) -> tuple[list[float], int]:
    """Returns the best values of a search's complete trials, and the number of evaluations of its packs."""
    config = replace(compose_sweep({"sweep.seed": seed}), sampler=Way(name=sampler, sampler=sampler).build(n))
    space = curves[max(curves)].space()
    arm = Arm(name=GRID.stem, settings={}, space=space, trials=n, sweep_config=config)
    storage = optuna.storages.InMemoryStorage()
    trials = ArmTrials(
        arm,
        study=optuna.create_study(storage=storage, study_name=arm.name),
        storage=storage,
        space=space,
        planned=n,
        rule=Halving(rungs=(2, 6), reduction_factor=2),
        first_trials=math.ceil(FIRST_TRIALS_FRACTION * n),
    )
    pack: list[Trial] = []
    orders, evaluations = itertools.count(), 0
    while True:
        while len(pack) < PACK_SLOTS:
            if (promoted := trials.next_promoted()) is not None:
                trials.promote(*promoted, order=next(orders))
                pack.append(promoted[0])
            elif trials.may_begin():
                params, _ = propose(arm, trials.history(), number=len(trials.trials), direction="minimize")
                pack.append(trials.begin(params, order=next(orders), attributes={}))
            else:
                break
        if not pack:
            complete = [trial for trial in trials.trials.values() if trial.state == "complete"]
            return [min(trial.values.values()) for trial in complete], evaluations
        evaluations += 1
        steps = {trial.number: max(trial.values, default=0) + 2 for trial in pack}
        for trial in pack:
            trials.store(trial, steps[trial.number], curves[steps[trial.number]].read(trial.params))
        for trial in sorted(pack, key=lambda trial: (steps[trial.number], trial.number)):
            goes_on, step = trials.decide(trial, steps[trial.number]), steps[trial.number]
            if step == max(curves):
                trials.end(trial, "complete", {}, value=min(trial.values.values()))
            elif not goes_on:
                trials.pause(trial, {}, step=step)
        pack = [trial for trial in pack if trial.state == "running"]


def measure_rungs(*, draws: int, gp_draws: int) -> list[dict[str, Any]]:
    """Returns one row per sampler and number of trials: the regret of the best complete trial."""
    table, curves = read_table(GRID), read_grid_curves()
    rows = []
    for sampler, n in itertools.product(("tpe", "gp"), GRID_TRIALS):
        found = [
            search_with_rungs(curves, sampler, n=n, seed=seed) for seed in range(gp_draws if sampler == "gp" else draws)
        ]
        regrets = [table.regret(min(values)) for values, _ in found]
        median, p95 = np.quantile(regrets, [0.5, 0.95])
        rows.append(
            {
                "sampler": sampler,
                "trials": n,
                **{f"within_{name}": statistics.fmean(r <= share for r in regrets) for name, share in WITHIN.items()},
                "mean_regret": round(statistics.fmean(regrets), 4),
                "median_regret": round(float(median), 4),
                "p95_regret": round(float(p95), 4),
                "pack_evaluations": round(statistics.fmean(evaluations for _, evaluations in found), 2),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def summarize(searches: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Returns statistics of several searches. A number of trials is None if too few searches were good enough."""
    result: dict[str, Any] = {"searches": len(searches)}
    for percent, share in WITHIN.items():
        needed = [next((i + 1 for i, regret in enumerate(each) if regret <= share), math.inf) for each in searches]
        for name, q in (("median", 0.5), ("p90", 0.9)):
            trials = float(np.quantile(needed, q, method="inverted_cdf"))
            result[f"{name}_trials_{percent}"] = int(trials) if math.isfinite(trials) else None
        result[f"reached_{percent}"] = round(statistics.fmean(math.isfinite(value) for value in needed), 4)
    median, p95 = np.quantile([min(each) for each in searches], [0.5, 0.95])
    return {**result, "median_regret": round(float(median), 5), "p95_regret": round(float(p95), 5)}


def measure_samplers(*, draws: int, gp_draws: int) -> list[dict[str, Any]]:
    """Returns one row per group of tables, number of trials and way; seeds of a group's tables are pooled."""
    groups: dict[str, tuple[list[Path], tuple[int, ...]]] = {"grid": ([GRID], GRID_TRIALS)}
    for task in LR_TASKS:
        groups[task] = (sorted(CURVES.glob(f"{task}_seed*.csv")), LR_TRIALS)
    rows = []
    for group, (paths, numbers) in groups.items():
        tables = [read_table(path) for path in paths]
        for n, way in itertools.product(numbers, WAYS):
            if (group != "grid" and "unordered" in way.name) or (n == NUM_SLOTS * 2 and way.startup_fraction):
                continue  # no choices; of 8 trials the first 4 begin before any result with a quarter too
            num = math.ceil((gp_draws if way.sampler == "gp" else draws) / len(tables))
            searches = [
                [table.regret(value) for value in replay(table, way, n=n, seed=seed).values]
                for table in tables
                for seed in range(num)
            ]
            rows.append({"table": group, "trials": n, "way": way.name, **summarize(searches)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--draws", type=int, default=100, help="seeds per number of trials and way")
    parser.add_argument("--gp-draws", type=int, default=30, help="like --draws, for the slower Gaussian process")
    parser.add_argument("--rungs", action="store_true", help="search the grid with rungs, and print JSON")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if args.rungs:
        print(json.dumps(measure_rungs(draws=args.draws, gp_draws=args.gp_draws), indent=1))
        return
    rows = measure_samplers(draws=args.draws, gp_draws=args.gp_draws)
    print(json.dumps(rows, indent=1) if args.json else "\n".join(lines_of(rows)))


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the rows as a table in Markdown."""
    each = " | ".join(f"trials to {percent} %: median | 90th | reached" for percent in WITHIN)
    lines = [
        f"| table | trials | way | {each} | regret: median | 95th |",
        f"|---|--:|---|{'--:|' * (3 * len(WITHIN) + 2)}",
    ]
    for row in rows:
        cells = [str(row[key]) for key in ("table", "trials", "way")]
        for percent in WITHIN:
            needed = [row[f"{name}_trials_{percent}"] for name in ("median", "p90")]
            cells += [f"> {row['trials']}" if trials is None else str(trials) for trials in needed]
            cells.append(f"{100 * row[f'reached_{percent}']:.0f} %")
        cells += [f"{100 * row[key]:.1f} %" for key in ("median_regret", "p95_regret")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
