"""Replays searches on stored complete results: the rate law, and the settings that are taken for each rank.

    python benchmarks/bench_proposals.py [--draws 100] [--powers]

Table: the grid of rank × α/r × learning rate of LoRA (`answers/grid_stdlib_docs_seed0.csv`, 36 steps). The value of a
learning rate is interpolated linearly in the logarithm of the rate. Regret is how much a setting is worse than the best
one, as a share of the gain: the frozen base minus the best of the table.

Each search proposes rank, α/r and learning rate of n trials, half of them before the first result, none stopped early.
A row has the mean over ranks of the regret of the setting that is taken for a rank, against the best of that rank. A
way that predicts takes the setting that it predicts best; the others take the best trial of the rank, or for a rank
without a trial the best trial's α/r and rate. Median and 95th percentile over draws.

`--powers` compares the coordinates lr · α^p: the regret of one shared value for all cells of rank and α/r.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
from numpy.typing import NDArray
from side_by_side import print_head, print_row

from lorasweep.config.compose import compose_run, compose_sweep
from lorasweep.config.data import ScoreMetric
from lorasweep.record import Subject, Trial
from lorasweep.sweep.controller import proposals
from lorasweep.sweep.controller.encoding import History, RateLaw
from lorasweep.sweep.controller.predictions import predict_best
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.ranges import Range

LOSS = ScoreMetric(name="loss", direction="minimize")
GRID = Path(__file__).parent / "answers" / "grid_stdlib_docs_seed0.csv"
RANK, RATIO, LR = "method.rank", "method.alpha", "optim.lr"
NUM_TRIALS = (8, 12, 16, 24)
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
OUTSIDE_REGRET = 0.5
"""Regret of a shared value at which the rate of a cell is outside of the grid."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Complete results, interpolated between learning rates; lower is better."""

    lines: Mapping[tuple[int, float], tuple[NDArray[np.float64], NDArray[np.float64]]]
    """By rank and α/r: the logarithms of the learning rates, ascending, and their values."""
    frozen: float

    @property
    def ranks(self) -> list[int]:
        return sorted({rank for rank, _ in self.lines})

    @property
    def gain(self) -> float:
        return self.frozen - min(self.best(rank) for rank in self.ranks)

    def best(self, rank: int) -> float:
        """Returns the best value of a rank."""
        return min(float(values.min()) for (r, _), (_, values) in self.lines.items() if r == rank)

    def read(self, params: Mapping[str, Any]) -> float:
        """Returns the value of a setting; outside of its rates that of the nearest rate."""
        rates, values = self.lines[params[RANK], params[RATIO]]
        return float(np.interp(math.log(params[LR]), rates, values))

    def regret(self, params: Mapping[str, Any]) -> float:
        """Returns how much worse a setting is than the best of its rank, as a share of the gain."""
        return (self.read(params) - self.best(params[RANK])) / self.gain


def read_grid() -> Table:
    values: dict[tuple[int, float], dict[float, float]] = defaultdict(dict)
    frozen = math.nan
    with GRID.open(newline="") as file:
        for row in csv.DictReader(file):
            last = float(row["values"].split()[-1])
            if row["method"] == "frozen":
                frozen = last
            else:
                rank = int(row["rank"])
                values[rank, round(float(row["alpha"]) / rank, 2)][math.log(float(row["lr"]))] = last
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
    Way(name="TPE in u", sampler="tpe"),
    Way(name="every rank, learning rate", sampler="gp", predicts=True, uses_law=False),
    Way(name="every rank, u (default of `confirm_each`)", sampler="gp", predicts=True),
)


def run_search(table: Table, arm: Arm) -> list[Trial]:
    """Returns the complete trials of a search, by number. The second half sees the results of the first."""
    trials = list[Trial]()
    for limit in (math.ceil(arm.trials / 2), arm.trials):
        begun = list[Trial]()
        while len(trials) + len(begun) < limit:
            number = len(trials) + len(begun)
            history = History(arm, [*trials, *begun], metric=LOSS)
            params, _ = proposals.propose(arm, history, number=number)
            begun.append(Trial(arm="", number=number, run="", params=dict(params), state="running"))
        trials += [replace(trial, state="complete", search_score=table.read(trial.params)) for trial in begun]
    return trials


def choose_settings(table: Table, way: Way, arm: Arm, trials: Sequence[Trial]) -> list[Mapping[str, Any]]:
    """Returns the setting that is taken for each rank."""
    chosen = list[Mapping[str, Any]]()
    for rank in table.ranks:
        if way.predicts:
            found = predict_best(arm, trials, Subject(arm=arm.name, key=RANK, value=rank), metric=LOSS)
            assert found is not None
            chosen.append(found.params)
        else:
            own = [trial for trial in trials if trial.params[RANK] == rank]
            best = min(own or trials, key=lambda trial: trial.search_score or math.inf)
            chosen.append({**best.params, RANK: rank})
    return chosen


def measure(table: Table, way: Way, *, n: int, draws: int) -> tuple[float, float]:
    """Returns median and 95th percentile, over searches with different seeds, of the mean regret over ranks."""
    rates, _ = next(iter(table.lines.values()))
    settings = {"method": "lora", "method.scaling": "alpha"}
    base_config = compose_run(settings)
    base = Arm(
        name="lora",
        settings=settings,
        corner_configs=(base_config,),
        space={
            RANK: Range(choices=table.ranks),
            RATIO: Range(choices=sorted({ratio for _, ratio in table.lines})),
            LR: Range(low=math.exp(rates[0]), high=math.exp(rates[-1]), log=True),
        },
        trials=n,
        sweep_config=compose_sweep({"sampler": way.sampler}),
        confirm_each=RANK if way.predicts else None,
    )
    regrets = []
    for seed in range(draws):
        config = replace(base.sweep_config, sweep=replace(base.sweep_config.sweep, seed=seed))
        arm = replace(base, sweep_config=config)
        with use_law(way):
            chosen = choose_settings(table, way, arm, run_search(table, arm))
        regrets.append(statistics.fmean(table.regret(setting) for setting in chosen))
    return float(np.median(regrets)), float(np.quantile(regrets, 0.95))


@contextmanager
def use_law(way: Way) -> Iterator[None]:
    """Replaces the rate law by plain learning rates inside a `with` block, for ways that do not use it."""
    with ExitStack() as stack:
        for user in () if way.uses_law else (History, predict_best):
            module = sys.modules[user.__module__]
            stack.enter_context(mock.patch.object(module, "build_rate_law", return_value=RateLaw(defaults={})))
        yield


def share_one_value(table: Table, power: float) -> tuple[float, float, float]:
    """Returns mean, 95th percentile and maximum over all cells of the regret of the best shared lr · α^power."""
    found = []
    for value in np.geomspace(1e-4, 1, 60):
        regrets = []
        for (rank, ratio), (rates, values) in table.lines.items():
            rate = math.log(value / (ratio * rank) ** power)
            is_inside = rates[0] <= rate <= rates[-1]
            cost = (float(np.interp(rate, rates, values)) - values.min()) / table.gain
            regrets.append(cost if is_inside else OUTSIDE_REGRET)
        found.append((float(np.mean(regrets)), float(np.quantile(regrets, 0.95)), max(regrets)))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100, help="searches per way and number of trials")
    parser.add_argument("--powers", action="store_true", help="compare the coordinates instead")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = read_grid()
    if args.powers:
        print_head("p", "mean", "95th percentile", "maximum")
        for power in POWERS:
            print_row(power, *share_one_value(table, power))
        return
    print_head("way", "n", "median", "95th percentile")
    for way in WAYS:
        for n in NUM_TRIALS:
            print_row(way.name, n, *measure(table, way, n=n, draws=args.draws))


if __name__ == "__main__":
    main()
