"""Replays arms that share learning rates on the stored grid: a prototype that asks whether sharing pays.

    python benchmarks/bench_shared_rates.py [--json] [--draws 100] [--gp-draws 30]

Each rank of `curves/grid_stdlib_docs.csv` is an arm of 8 trials over learning rate and α/r, judged by the best and the
gain of its own rank; see `bench_proposals.py` for the measures and the order of trials. An arm searches alone, or draws
its first half within half a decade of the best learning rate of the rank before, or asks one Gaussian process that sees
the trials of all ranks. That process is this file's own; what it does for an arm alone is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from bench_proposals import (
    FIRST_PART_FRACTION,
    GRID,
    LR,
    RANK,
    RATIO,
    Ask,
    Matrix,
    Replay,
    Table,
    Way,
    ask_product,
    lines_of,
    read_table,
    run_arm,
    summarize,
)
from scipy.linalg import cho_solve
from scipy.optimize import minimize
from scipy.stats import norm

ARM_TRIALS = 8
HALF_DECADE = 10**0.5
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
            if way.endswith("together"):  # every arm runs its first half before any second half, as in the product
                rest = [replace(each, params=each.params[half:], values=each.values[half:]) for each in found]
                known = [*first_halves[:place], *first_halves[place + 1 :], *rest]
            num_startup = 0 if known and way.endswith("after rank") else half
            process = SharedProcess(known, frozen=table.frozen)
            ask = process.ask_in(arm, startup=sobol[place], num_startup=num_startup)
        found.append(run_arm(arm, ask, n=ARM_TRIALS, first_part=half))
    return {arm.name: [arm.regret(v) for v in each.values] for arm, each in zip(arms, found, strict=True)}


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
        """Returns a function that proposes trials of one arm; `startup` proposes the first trials."""
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
            # An arm without results must improve on the best value that the model predicts for it.
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
    parser.add_argument("--draws", type=int, default=100, help="seeds per way")
    parser.add_argument("--gp-draws", type=int, default=30, help="like --draws, for the product's Gaussian process")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = measure_sharing(draws=args.draws, gp_draws=args.gp_draws)
    print(json.dumps(rows, indent=1) if args.json else "\n".join(lines_of(rows)))


if __name__ == "__main__":
    main()
