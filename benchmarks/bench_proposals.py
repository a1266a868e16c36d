"""Replays searches on stored complete results: the rate law, and trials until a setting is nearly the best.

    python benchmarks/bench_proposals.py [--json] [--draws 100] [--powers]

Table: the grid of rank × α/r × learning rate of LoRA (`curves/grid_stdlib_docs.csv`, 36 steps). The value of a learning
rate is interpolated linearly in the logarithm of the rate, between the neighbours with the same rank and α/r. Regret is
how much a setting is worse than the best one, as a share of the gain: the frozen base minus the best of the table.

Each search proposes rank, α/r and learning rate of n trials, half of them before the first result, none stopped early.
`winner`: the regret of the best trial. `every rank`: the mean over ranks of the regret of the setting that is taken for
a rank, against the best of that rank. A way that predicts takes the setting that it predicts best; the others take the
best trial of the rank, or for a rank without a trial the best trial's α/r and rate.

`--powers` compares the coordinates lr · α^p · r^-q. On the grid: the regret of one shared value for all cells of rank
and α/r. On the other stored curves, whose points are a Sobol sequence: the leave-one-out error of a Gaussian process
over the coordinate and the logarithm of the rank, as a share of the variance; length scales and noise are the best of a
small grid.
"""

from __future__ import annotations

import argparse
import csv
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

from lorasweep.config.compose import compose_sweep
from lorasweep.record import Trial
from lorasweep.sweep.controller import proposals
from lorasweep.sweep.controller.encoding import History, RateLaw
from lorasweep.sweep.controller.predictions import predict_best
from lorasweep.sweep.definition.arms import Arm

CURVES = Path(__file__).parent / "curves"
GRID = CURVES / "grid_stdlib_docs.csv"
CURVE_TASKS = ("stdlib_docs", "stdlib_code", "e2e_nlg", "movie_snippets")
RANK, RATIO, LR = "method.rank", "method.alpha", "optim.lr"
NUM_TRIALS = (8, 12, 16, 24)
FIRST_PART_FRACTION = 0.5
WITHIN = (0.02, 0.05)
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
RANK_POWERS = (-0.25, 0.0, 0.25, 0.5, 1.0)
Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Complete results, interpolated between learning rates; lower is better."""

    lines: Mapping[tuple[int, float], tuple[Matrix, Matrix]]
    """By rank and α/r: the logarithms of the learning rates, ascending, and their values."""
    frozen: float

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for rank, _ in self.lines})

    @property
    def lr_range(self) -> tuple[float, float]:
        rates = next(iter(self.lines.values()))[0]
        return math.exp(rates[0]), math.exp(rates[-1])

    def best(self, rank: int | None = None) -> float:
        """Returns the best value of a rank, or of the table."""
        return min(float(values.min()) for (r, _), (_, values) in self.lines.items() if rank in (None, r))

    def read(self, params: Mapping[str, Any]) -> float:
        """Returns the value of a setting; outside of its rates that of the nearest rate."""
        rates, values = self.lines[params[RANK], params[RATIO]]
        return float(np.interp(math.log(params[LR]), rates, values))

    def regret(self, params: Mapping[str, Any], *, rank: int | None = None) -> float:
        """Returns how much worse a setting is than the best of a rank, or of the table, as a share of the gain."""
        return (self.read(params) - self.best(rank)) / (self.frozen - self.best())


def read_grid() -> Table:
    values: dict[tuple[int, float], dict[float, float]] = defaultdict(dict)
    frozen = math.nan
    with GRID.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row["rank"]:
                frozen = float(row["value"])
            elif row["evaluation"] == "12":
                rank, rate = int(row["rank"]), math.log(float(row["lr"]))
                values[rank, round(float(row["alpha"]) / rank, 2)][rate] = float(row["value"])
    lines = {key: (np.array(sorted(line)), np.array([line[x] for x in sorted(line)])) for key, line in values.items()}
    return Table(lines=lines, frozen=frozen)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How trials are proposed, and the setting of each rank is chosen."""

    name: str
    sampler: str
    predicts: bool = False
    """Whether all ranks share the search, and each gets its predicted setting (`confirm_each`)."""
    uses_law: bool = True
    """Whether the model sees u instead of the learning rate."""


WAYS = (
    Way(name="random", sampler="random", uses_law=False),
    Way(name="Optuna's TPE, learning rate", sampler="tpe", uses_law=False),
    Way(name="TPE in u", sampler="tpe"),
    Way(name="Optuna's GP, learning rate", sampler="gp", uses_law=False),
    Way(name="Optuna's GP in u", sampler="gp"),
    Way(name="every rank, learning rate", sampler="gp", predicts=True, uses_law=False),
    Way(name="every rank, u (default of `confirm_each`)", sampler="gp", predicts=True),
)


def run_search(table: Table, way: Way, arm: Arm, *, n: int) -> list[Trial]:
    """Returns the complete trials of a search, by number."""
    params = list[dict[str, Any]]()
    for limit in (math.ceil(FIRST_PART_FRACTION * n), n):
        known = len(params)
        while len(params) < limit:
            trials = [_make_trial(i, table, each, is_known=i < known) for i, each in enumerate(params)]
            history = History(arm, trials, direction="minimize")
            params.append(proposals.propose(arm, history, number=len(params))[0])
    return [_make_trial(number, table, each, is_known=True) for number, each in enumerate(params)]


def _make_trial(number: int, table: Table, params: Mapping[str, Any], *, is_known: bool) -> Trial:
    value, state = (table.read(params), "complete") if is_known else (None, "running")
    return Trial(arm="", number=number, run="", params=dict(params), state=state, value=value)


def choose_settings(table: Table, way: Way, arm: Arm, trials: Sequence[Trial]) -> dict[int, Mapping[str, Any]]:
    """Returns the setting that is taken for each rank."""
    winner = min(trials, key=lambda trial: trial.value or math.inf)
    chosen: dict[int, Mapping[str, Any]] = {}
    for rank in table.ranks:
        if way.predicts:
            found = predict_best(arm, trials, direction="minimize", fixed={RANK: rank})
            assert found is not None
            chosen[rank] = found.params
            continue
        own = [trial for trial in trials if trial.params[RANK] == rank]
        best = min(own, key=lambda trial: trial.value or math.inf, default=winner)
        chosen[rank] = {**best.params, RANK: rank}
    return chosen


def measure(table: Table, way: Way, *, n: int, draws: int) -> dict[str, Any]:
    """Returns one row: statistics of the regret over searches with different seeds."""
    low, high = table.lr_range
    base = Arm(
        name="lora",
        settings={"method": "lora", "method.scaling": "alpha"},
        space={
            RANK: CategoricalDistribution(table.ranks),
            RATIO: CategoricalDistribution(sorted({ratio for _, ratio in table.lines})),
            LR: FloatDistribution(low, high, log=True),
        },
        trials=n,
        sweep_config=compose_sweep({"sampler": way.sampler}),
        confirm_each=RANK if way.predicts else None,
    )
    winners, by_rank = [], []
    with _UseLaw(way):
        for seed in range(draws):
            config = replace(base.sweep_config, sweep=replace(base.sweep_config.sweep, seed=seed))
            arm = replace(base, sweep_config=config)
            arm.__dict__["corner_configs"] = base.corner_configs  # to compose them again takes longer than a search
            trials = run_search(table, way, arm, n=n)
            winners.append(min(table.regret(trial.params) for trial in trials))
            chosen = choose_settings(table, way, arm, trials)
            by_rank.append(statistics.fmean(table.regret(chosen[rank], rank=rank) for rank in table.ranks))
    row: dict[str, Any] = {"way": way.name, "trials": n}
    for name, regrets in (("winner", winners), ("every_rank", by_rank)):
        row |= {f"{name}_median": float(np.median(regrets)), f"{name}_p95": float(np.quantile(regrets, 0.95))}
        row |= {f"{name}_within_{share:g}": statistics.fmean(r <= share for r in regrets) for share in WITHIN}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


class _UseLaw:
    """Replaces the rate law by plain learning rates inside a `with` block, for ways that do not use it."""

    def __init__(self, way: Way) -> None:
        self._modules = () if way.uses_law else tuple(sys.modules[user.__module__] for user in (History, predict_best))
        self._before = [module.build_rate_law for module in self._modules]

    def __enter__(self) -> None:
        for module in self._modules:
            module.build_rate_law = lambda arm: RateLaw(defaults={})  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        for module, before in zip(self._modules, self._before, strict=True):
            module.build_rate_law = before  # type: ignore[attr-defined]


def measure_powers(table: Table) -> list[dict[str, Any]]:
    """Returns a row per pair of powers: regrets of one shared value on the grid, errors on the other curves."""
    rows = []
    for p in POWERS:
        for q in RANK_POWERS:
            mean, p95, largest = _share_one_value(table, p, q)
            row: dict[str, Any] = {"alpha_power": p, "rank_power": q, "mean": mean, "p95": p95, "max": largest}
            row |= {task: round(_leave_one_out(task, p, q), 3) for task in CURVE_TASKS}
            rows.append(row)
    return rows


def _share_one_value(table: Table, p: float, q: float) -> tuple[float, float, float]:
    """Returns mean, 95th percentile and maximum over all cells of the regret of the best shared value."""
    gain, best = table.frozen - table.best(), None
    for value in np.geomspace(1e-4, 1, 60):
        regrets = []
        for (rank, ratio), (rates, values) in table.lines.items():
            rate = math.log(value * rank**q / (ratio * rank) ** p)
            is_inside = rates[0] <= rate <= rates[-1]
            regrets.append((float(np.interp(rate, rates, values)) - values.min()) / gain if is_inside else 0.5)
        found = tuple(round(float(x), 4) for x in (np.mean(regrets), np.quantile(regrets, 0.95), max(regrets)))
        best = found if best is None else min(best, found)
    assert best is not None
    return best  # type: ignore[return-value]


def _leave_one_out(task: str, p: float, q: float) -> float:
    """Returns the lowest mean squared leave-one-out error over length scales and noise, for standardised scores."""
    rows = []
    for path in sorted(CURVES.glob(f"{task}_lora_seed*.csv")):
        with path.open(newline="") as file:
            found = [row for row in csv.DictReader(file) if row["rank"]]
        last = max(int(row["evaluation"]) for row in found)
        rows += [row for row in found if int(row["evaluation"]) == last]
    rank, alpha, rate, value = (np.array([float(row[key]) for row in rows]) for key in ("rank", "alpha", "lr", "value"))
    costs = -value if task == "movie_snippets" else value
    costs = np.minimum(costs, np.median(costs) + 1.5 * (np.median(costs) - costs.min()))
    costs = (costs - costs.mean()) / costs.std()
    points = np.column_stack([np.log10(rate) + p * np.log10(alpha) - q * np.log10(rank), np.log2(rank) / 6])
    errors = []
    for lengths in ((a, b) for a in (0.2, 0.35, 0.6) for b in (0.7, 1.5, 3.0)):
        squares = (((points[:, None] - points[None]) / np.array(lengths)) ** 2).sum(axis=-1)
        for noise in (0.02, 0.1, 0.3):
            inverse = np.linalg.inv(np.exp(-squares / 2) + noise * np.eye(len(costs)))
            errors.append(float(np.mean((inverse @ costs / np.diag(inverse)) ** 2)))
    return min(errors)


def print_table(rows: Sequence[Mapping[str, Any]], form: Callable[[Any], str]) -> None:
    """Prints rows as a table in Markdown."""
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(form(value) for value in row.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--draws", type=int, default=100, help="searches per way and number of trials")
    parser.add_argument("--powers", action="store_true", help="compare the coordinates instead")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = read_grid()
    if args.powers:
        rows = measure_powers(table)
    else:
        rows = [measure(table, way, n=n, draws=args.draws) for way in WAYS for n in NUM_TRIALS]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(rows, lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))


if __name__ == "__main__":
    main()
