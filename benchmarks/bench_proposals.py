"""Replays samplers on stored complete results (`benchmarks/curves/`): how many trials until one is nearly the best?

    python benchmarks/bench_proposals.py [--json] [--draws 100] [--gp-draws 30] [--parts samplers sharing]

Tables: the grid of rank × α/r × learning rate of LoRA (`grid_stdlib_docs.csv`), and full fine-tuning's learning rate on
two data sets and three seeds. A proposed learning rate is read off by linear interpolation in its logarithm between the
neighbours of the same rank and α/r. LoRA's other curves are left out: 24 points in three dimensions do not say what
lies between them (each left out in turn and read off from the rest is wrong by a median of 7 to 28 % of the gain; of
full's, by at most 1.2 %).

A trial's value is its best evaluation, as in the product. The gain is the frozen base minus the best of the table; a
trial is within 1 % when it is worse than the best of the table by at most a hundredth of the gain. Regret is how much
the best of n trials is worse than the best of the table, in shares of the gain. Nothing is stopped early. Trials are
asked for as the worker does it: packs of 4, whose members know the results of earlier packs only, and with a sampler
that learns, half of the trials before the first result.

Then each rank of the grid is an arm of 8 trials, judged by the best and the gain of its own rank, to see whether arms
should share what they learn about learning rates.
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
from scipy.linalg import cho_solve
from scipy.optimize import minimize
from scipy.stats import norm

from lorasweep.config.sweep import FixedSampler, ModelBasedSampler, SamplerConfig
from lorasweep.sweep.controller.proposals import propose
from lorasweep.sweep.space import Space

CURVES = Path(__file__).parent / "curves"
WITHIN = 0.01
"""A trial that is worse than the best by at most this share of the gain is good enough."""
NUM_SLOTS = 4
FIRST_PART_FRACTION = 0.5
"""Share of an arm's trials that a sampler that learns proposes before the first result."""
GRID_TRIALS = (8, 12, 16, 24)
LR_TRIALS = (8, 12)
"""Trials on the tables that have a learning rate only."""
ARM_TRIALS = 8
GRID = CURVES / "grid_stdlib_docs.csv"
LR_TASKS = ("stdlib_docs_full", "stdlib_code_full")
QUANTILES = {"median": 0.5, "p90": 0.9}
TRIALS_KEYS = tuple(f"{name}_trials" for name in QUANTILES)
HALF_DECADE = 10**0.5
RANK, RATIO, LR = "method.rank", "method.alpha_over_rank", "optim.lr"

Setting = tuple[float, ...]
"""Rank and α/r; empty where only the learning rate is searched."""
Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Complete results, of which any learning rate can be read off; lower is better."""

    name: str
    lines: Mapping[Setting, tuple[Matrix, Matrix]]
    """Per setting the logarithms of its learning rates, ascending, and their values."""
    frozen: float

    @property
    def best(self) -> float:
        """Best value of the table: a line between two points is nowhere lower than both."""
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
        """Returns how much worse than the best a value is, as a share of the gain."""
        return (value - self.best) / (self.frozen - self.best)

    def space(self, *, ordered: bool = True, lr_range: tuple[float, float] | None = None) -> Space:
        """Returns the space that is searched; unordered choices are texts, whose order says nothing to a sampler."""
        low, high = lr_range or self.lr_range
        space: Space = {LR: FloatDistribution(low, high, log=True)}
        for place, key in enumerate((RANK, RATIO)):
            if values := sorted({setting[place] for setting in self.lines if setting}):
                space[key] = CategoricalDistribution([value if ordered else str(value) for value in values])
        return space

    def of_rank(self, rank: float) -> Table:
        """Returns the part of one rank, with its own best."""
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
            setting = (float(row["rank"]), float(row["alpha"]) / float(row["rank"])) if row["rank"] else ()
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
    """Optuna's own TPE with so many random trials, as before the controller had `propose`."""
    slots: int = NUM_SLOTS
    capped: bool = False
    """Whether values worse than the frozen base are told as equal to it, which the product does not do."""

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
    Way(name="gp, 1/2 Sobol, capped at frozen", sampler="gp", capped=True),
)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The trials of one arm in their order."""

    params: tuple[Mapping[str, Any], ...]
    values: tuple[float, ...]
    known: tuple[int, ...]
    """How many results there were when each was asked for."""

    @property
    def best_lr(self) -> float:
        """Learning rate of the best trial."""
        return float(self.params[self.values.index(min(self.values))][LR])


Ask = Callable[[int, Sequence[Mapping[str, Any]], Sequence[float]], Mapping[str, Any]]
"""Returns the parameters of a trial from its number, those of all earlier ones, and the values of those that ended."""


def run_arm(table: Table, ask: Ask, *, n: int, slots: int = NUM_SLOTS, first_part: int | None = None) -> Replay:
    """Asks for n trials pack by pack, no more than `first_part` before the first result, and reads off their values."""
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

    def ask(number: int, params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Mapping[str, Any]:
        history = show_history(space, params, [min(v, table.frozen) for v in values] if way.capped else values)
        is_first = first_lr is not None and number < math.ceil(FIRST_PART_FRACTION * n)
        return propose(
            table.space(lr_range=first_lr) if is_first else space,
            history,
            sampler=FixedSampler(name="qmc") if is_first else sampler,
            direction="minimize",
            trials=n,
            number=number,
            seed=seed,
            arm=table.name,
        )

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
    """Returns a caller of Optuna's own TPE on a study of its own."""
    space = table.space(ordered=way.ordered)
    startup = way.optuna_startup or 0
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed))

    def ask(number: int, params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Mapping[str, Any]:
        told = sum(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))
        for ended in range(told, len(values)):
            study.tell(ended, values[ended])
        return study.ask(space).params

    return ask


class SharedProcess:
    """A Gaussian process over log rank, log α/r and log learning rate on the trials of one arm or of several.

    Matérn 5/2 with one length per key, lengths and noise by maximum posterior; values worse than the frozen base count
    as equal to it. Running trials have the value that the model predicts. The next point has the most expected
    improvement on the arm's best, of all α/r × 100 learning rates of the arm's rank.
    """

    def __init__(self, others: Sequence[Replay], *, frozen: float) -> None:
        """Takes the trials of the other arms and the value of the frozen base."""
        self.params = [params for each in others for params in each.params]
        self.values = [value for each in others for value in each.values]
        self.frozen = frozen

    def ask_in(self, arm: Table, *, startup: Ask, num_startup: int) -> Ask:
        """Returns a caller for one arm, whose first trials `startup` proposes."""
        rank = next(iter(arm.lines))[0]
        rates = np.geomspace(*arm.lr_range, 100)
        candidates = [{RANK: rank, RATIO: ratio, LR: float(lr)} for _, ratio in arm.lines for lr in rates]

        def ask(number: int, params: Sequence[Mapping[str, Any]], values: Sequence[float]) -> Mapping[str, Any]:
            if number < num_startup:
                return startup(number, params, values)
            x = self._inputs([*self.params, *params[: len(values)]])
            y = np.minimum([*self.values, *values], self.frozen)
            y = (y - y.mean()) / (y.std() + 1e-9)
            logs = fit_lengths(x, y)
            if running := params[len(values) :]:
                pending = self._inputs(running)
                y = np.append(y, predict(x, y, pending, logs)[0])
                x = np.vstack([x, pending])
            # An arm without results wants to be better than what the model expects of its best point.
            mean, deviation = predict(x, y, self._inputs(candidates), logs)
            mine = y[len(self.values) :]
            goal = float(mine.min()) if len(mine) else float(mean.min())
            z = (goal - mean) / deviation
            return candidates[int(np.argmax(deviation * (z * norm.cdf(z) + norm.pdf(z))))]

        return ask

    def _inputs(self, params: Sequence[Mapping[str, Any]]) -> Matrix:
        return np.array([[math.log2(p[RANK]) / 5, math.log2(p[RATIO]) / 3, math.log10(p[LR]) / 2] for p in params])


def fit_lengths(x: Matrix, y: Matrix) -> Matrix:
    """Returns the logarithms of three lengths, the signal's and the noise's variance."""

    def cost(logs: Matrix) -> float:
        factor = np.linalg.cholesky(covariance(x, x, logs) + (math.exp(logs[4]) + 1e-6) * np.eye(len(x)))
        fit = 0.5 * y @ cho_solve((factor, True), y) + np.log(np.diag(factor)).sum()
        prior = 0.5 * (((logs[:3] - math.log(0.5)) ** 2).sum() + logs[3] ** 2 + ((logs[4] + 7) / 2) ** 2)
        return float(fit + prior)

    start = np.array([math.log(0.5)] * 3 + [0.0, -7.0])
    found: Matrix = minimize(cost, start, method="L-BFGS-B", bounds=[(-3, 3)] * 4 + [(-12, 0)]).x
    return found


def covariance(a: Matrix, b: Matrix, logs: Matrix) -> Matrix:
    """Returns the Matérn 5/2 covariance between two sets of points."""
    scaled = (a[:, None] - b[None]) / np.exp(logs[:3])
    distance = np.sqrt(5 * (scaled**2).sum(-1))
    result: Matrix = math.exp(logs[3]) * (1 + distance + distance**2 / 3) * np.exp(-distance)
    return result


def predict(x: Matrix, y: Matrix, at: Matrix, logs: Matrix) -> tuple[Matrix, Matrix]:
    """Returns mean and standard deviation at points."""
    factor = np.linalg.cholesky(covariance(x, x, logs) + (math.exp(logs[4]) + 1e-6) * np.eye(len(x)))
    cross = covariance(x, at, logs)
    spread = math.exp(logs[3]) - (cross * cho_solve((factor, True), cross)).sum(0)
    return cross.T @ cho_solve((factor, True), y), np.sqrt(np.maximum(spread, 1e-9))


SHARING = (
    "tpe, each arm alone",
    "gp, each arm alone",
    "tpe, first half near the best rate of the rank before",
    "gp, first half near the best rate of the rank before",
    "own process, each arm alone",
    "own process, shared, arms together",
    "own process, shared, rank after rank",
)


def search_ranks(table: Table, way: str, *, seed: int) -> dict[str, list[float]]:
    """Returns the regrets of each arm's trials in their order; an arm is a rank, from the lowest on."""
    arms = [table.of_rank(rank) for rank in sorted({setting[0] for setting in table.lines})]
    half = math.ceil(FIRST_PART_FRACTION * ARM_TRIALS)
    sobol = [ask_product(arm, Way(name="", sampler="qmc"), n=ARM_TRIALS, seed=seed) for arm in arms]
    first_halves = [run_arm(arm, ask, n=half) for arm, ask in zip(arms, sobol, strict=True)]
    found: list[Replay] = []
    for place, arm in enumerate(arms):
        if not way.startswith("own process"):
            near = None
            if way.endswith("before") and found:
                (low, high), best = arm.lr_range, found[-1].best_lr
                near = max(best / HALF_DECADE, low), min(best * HALF_DECADE, high)
            ask = ask_product(arm, Way(name="", sampler=way.split(",")[0]), n=ARM_TRIALS, seed=seed, first_lr=near)
        else:
            known = [] if way.endswith("alone") else found
            if way.endswith("together"):  # every arm has its first half before one goes on, much as in the product
                rest = [replace(each, params=each.params[half:], values=each.values[half:]) for each in found]
                known = [*first_halves[:place], *first_halves[place + 1 :], *rest]
            num_startup = 0 if known and way.endswith("after rank") else half
            process = SharedProcess(known, frozen=table.frozen)
            ask = process.ask_in(arm, startup=sobol[place], num_startup=num_startup)
        found.append(run_arm(arm, ask, n=ARM_TRIALS, first_part=half))
    return {arm.name: [arm.regret(v) for v in each.values] for arm, each in zip(arms, found, strict=True)}


def summarize(searches: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Returns what several searches gave; a number of trials is None where too few came within 1 %."""
    needed = [next((i + 1 for i, regret in enumerate(each) if regret <= WITHIN), math.inf) for each in searches]
    least = [min(each) for each in searches]
    trials = {f"{name}_trials": float(np.quantile(needed, q, method="inverted_cdf")) for name, q in QUANTILES.items()}
    return {
        **{key: value if math.isfinite(value) else None for key, value in trials.items()},
        "reached": round(statistics.fmean(math.isfinite(value) for value in needed), 4),
        "median_regret": round(float(np.quantile(least, 0.5)), 5),
        "p95_regret": round(float(np.quantile(least, 0.95)), 5),
        "searches": len(searches),
    }


def measure_samplers(*, draws: int, gp_draws: int) -> list[dict[str, Any]]:
    """Returns one row per group of tables, number of trials and way; seeds of a group's tables are pooled."""
    groups = {"grid": ([GRID], GRID_TRIALS)}
    for task in LR_TASKS:
        groups[task] = (sorted(CURVES.glob(f"{task}_seed*.csv")), LR_TRIALS)
    rows = []
    for group, (paths, numbers) in groups.items():
        tables = [read_table(path) for path in paths]
        for n, way in itertools.product(numbers, WAYS):
            if group != "grid" and "unordered" in way.name:
                continue  # nothing but a learning rate to search
            num = math.ceil((gp_draws if way.sampler == "gp" else draws) / len(tables))
            searches = [
                [table.regret(value) for value in replay(table, way, n=n, seed=seed).values]
                for table in tables
                for seed in range(num)
            ]
            rows.append({"table": group, "trials": n, "way": way.name, **summarize(searches)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def measure_sharing(*, draws: int, gp_draws: int) -> list[dict[str, Any]]:
    """Returns one row per way to share; all arms together, and `arms` has them one by one."""
    table, rows = read_table(GRID), []
    for way in SHARING:
        found = [search_ranks(table, way, seed=seed) for seed in range(gp_draws if way.startswith("gp") else draws)]
        by_arm = {arm: [each[arm] for each in found] for arm in found[0]}
        pooled = summarize([search for searches in by_arm.values() for search in searches])
        arms = {arm: summarize(searches) for arm, searches in by_arm.items()}
        rows.append({"table": "ranks", "trials": ARM_TRIALS, "way": way, **pooled, "arms": arms})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--draws", type=int, default=100, help="seeds per number of trials and way")
    parser.add_argument("--gp-draws", type=int, default=30, help="the same for a Gaussian process, which is slower")
    parser.add_argument("--parts", nargs="+", default=["samplers", "sharing"], choices=["samplers", "sharing"])
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = measure_samplers(draws=args.draws, gp_draws=args.gp_draws) if "samplers" in args.parts else []
    rows += measure_sharing(draws=args.draws, gp_draws=args.gp_draws) if "sharing" in args.parts else []
    print(json.dumps(rows, indent=1) if args.json else "\n".join(lines_of(rows)))


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the rows as a table in Markdown."""
    columns = "table | trials | way | trials to 1 %: median | 90th | reached | regret: median | 95th | searches"
    lines = [f"| {columns} |", f"|---|--:|---|{'--:|' * 6}"]
    for row in rows:
        needed = [f"> {row['trials']}" if row[key] is None else f"{row[key]:.0f}" for key in TRIALS_KEYS]
        shares = f"{row['reached']:.0%} | {row['median_regret']:.1%} | {row['p95_regret']:.1%}".replace("%", " %")
        lines.append(
            f"| {row['table']} | {row['trials']} | {row['way']} | {' | '.join(needed)} | {shares} | {row['searches']} |"
        )
    return lines


if __name__ == "__main__":
    main()
