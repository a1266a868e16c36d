"""Measures how often 95 % intervals contain the true value, on invented scores of few seeds and many examples.

Arms have seed noise of standard deviation 1 and, in the second table, examples whose difficulty has standard deviation
10. "difference" is that of two equal arms on the same seeds and examples, so that difficulty cancels.

In the third table examples come in groups, such as the blocks of a document. A group has a difficulty of standard
deviation 4, and a difficulty for each arm alone of standard deviation 2. Groups have 5 to 40 examples, or uneven sizes:
lognormal with standard deviation 1, as uneven as Python's documentation. Each repeat draws other seeds and groups.

The fourth table is about a bounded metric. The accuracies of seeds have a beta distribution. It compares the report's t
interval, which is cut at 0 and 1, with a t interval on the logit scale, which never leaves the range: how often they
contain the true mean, their mean width, and how often the first one was cut.

The last table is about the advised rank: how often it is truly worse than the best rank by more than the margin, and
how often a rank is advised. Each number is that of the worst of three noise levels.

    python benchmarks/bench_intervals.py --repeats 1000
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
from scipy import stats
from scipy.special import expit, logit

from lorasweep.config.sweep import Margin
from lorasweep.report.evidence.equivalence import measure_margin
from lorasweep.report.evidence.estimates import estimate_sum
from lorasweep.report.evidence.ranks import choose_rank
from lorasweep.report.evidence.scores import ConfirmScores, ExampleScores, build_scores
from lorasweep.report.evidence.verdicts import compare_pairs

MARGIN = 0.05
TRUTHS = {
    "saturating": (0.20, 0.07, 0.02, 0.0),
    "one rank is best": (0.0501, 0.0501, 0.0501, 0.0),
    "peak in the middle": (0.0501, 0.0, 0.03, 0.0501),
    "flat": (0.0, 0.0, 0.0, 0.0),
}
"""How much worse each rank is than the best one, in shares of full's gain."""
NOISES = (0.005, 0.02, 0.05)
"""The standard deviation over seeds, in shares of full's gain."""
BOUNDED = ((0.69, 0.08), (0.9, 0.03), (0.98, 0.015))
"""Mean and standard deviation of accuracies over seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=100)
    asked = parser.parse_args()
    print("over seeds alone: how often the 95 % interval contains the true mean")
    print("seeds  percentile   BCa     t")
    for seeds in (2, 3, 5, 10, 20):
        print(f"{seeds:5}  {'  '.join(f'{share:8.1%}' for share in cover_seeds(seeds, asked.repeats))}")
    print(f"over seeds and {asked.examples} examples: plain two-level bootstrap, and ours; mean, then difference")
    print("seeds   plain    ours    difference")
    for seeds in (3, 5, 10):
        shares = cover_both(seeds, asked.examples, asked.repeats)
        print(f"{seeds:5}  {'  '.join(f'{share:6.1%}' for share in shares)}")
    print("over seeds and groups of examples; with groups: mean, difference; as if examples were independent: the same")
    print("sizes    seeds  groups    groups           independent")
    for are_uneven, seeds, groups in itertools.product((False, True), (3, 5, 10), (10, 16, 50)):
        shares = [
            share
            for with_groups in (True, False)
            for share in cover_groups(seeds, groups, asked.repeats, are_uneven=are_uneven, with_groups=with_groups)
        ]
        sizes = "uneven" if are_uneven else "5 to 40"
        print(f"{sizes:8}{seeds:6}{groups:8}  {'  '.join(f'{share:6.1%}' for share in shares)}", flush=True)
    print("a metric from 0 to 1: coverage and width of the cut t interval, of the logit interval; how often it is cut")
    for (mean, deviation), seeds in itertools.product(BOUNDED, (2, 3, 5, 10)):
        numbers = cover_bounded(mean, deviation, seeds, asked.repeats)
        print(f"{mean:5} ± {deviation:5}{seeds:6}  {'  '.join(f'{number:6.1%}' for number in numbers)}")
    print("rank advice: wrong by the earlier rule (not distinguishably worse than the best); wrong; settled")
    for truth, worse in TRUTHS.items():
        for seeds in (2, 3, 5, 10):
            print(f"{truth:18}  {seeds:5}  {'  '.join(f'{s:6.1%}' for s in advise_ranks(worse, seeds, asked.repeats))}")


def advise_ranks(worse: tuple[float, ...], seeds: int, repeats: int) -> list[float]:
    """Returns how often the advice is wrong by the earlier rule, how often it is wrong, and how often it is settled."""
    rng, levels = np.random.default_rng(seeds), []
    arms = {4.0**power: f"rank{power}" for power in range(len(worse))}
    means = {"full": 1.0} | {arm: 1.0 + lost for arm, lost in zip(arms.values(), worse, strict=True)}
    is_wrong = {rank: lost > MARGIN for rank, lost in zip(arms, worse, strict=True)}
    for noise in NOISES:
        found = []
        for _ in range(repeats):
            values = {(arm, seed): mean + rng.normal(0, noise) for arm, mean in means.items() for seed in range(seeds)}
            scores = build_scores({**values, ("base", 0): 2.0}, {}, deterministic=frozenset({"base"}))
            margin = Margin(value=MARGIN, is_share_of_gain=True)
            measured = measure_margin(scores, margin, base="base", full="full", sign=1)
            verdict = choose_rank(scores, arms, measured, sign=1) if measured else None
            rank = verdict.rank if verdict else None
            earlier = choose_by_earlier_rule(scores, arms)
            found.append((is_wrong[earlier], rank is not None and is_wrong[rank], rank is not None))
        levels.append(np.mean(found, axis=0))
    earlier_wrong, wrong, settled = np.array(levels).T
    return [float(earlier_wrong.max()), float(wrong.max()), float(settled.min())]


def choose_by_earlier_rule(scores: ConfirmScores, arms: dict[float, str]) -> float:
    """Returns the smallest rank that is not significantly worse than the rank with the best mean."""
    pairs = {(pair.first, pair.second): pair.verdict for pair in compare_pairs(scores, [*arms.values()], sign=1)}
    best = min(arms, key=lambda rank: np.mean([*scores.values[arms[rank]].values()]))
    lower = (rank for rank in arms if rank < best and pairs[arms[rank], arms[best]] != "worse")
    return next(lower, best)


def cover_seeds(seeds: int, repeats: int) -> list[float]:
    rng, hits = np.random.default_rng(0), []
    for _ in range(repeats):
        values = rng.normal(0, 1, seeds)
        drawn = values[rng.integers(seeds, size=(2000, seeds))].mean(axis=1)
        scores = build_scores({("a", seed): float(value) for seed, value in enumerate(values)}, {})
        found = estimate_sum(scores, {"a": 1.0})
        bca = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=2000, rng=rng).confidence_interval
        hits.append([holds(np.quantile(drawn, [0.025, 0.975])), holds(bca), holds(found.interval if found else None)])
    return [float(share) for share in np.mean(hits, axis=0)]


def cover_bounded(mean: float, deviation: float, seeds: int, repeats: int) -> list[float]:
    rng, rows = np.random.default_rng(3), []
    concentration = mean * (1 - mean) / deviation**2 - 1
    for values in rng.beta(mean * concentration, (1 - mean) * concentration, (repeats, seeds)):
        scores = build_scores({("a", seed): float(value) for seed, value in enumerate(values)}, {}, score_range=(0, 1))
        found = estimate_sum(scores, {"a": 1.0})
        assert found
        assert found.distribution
        assert found.interval
        logits = stats.ttest_1samp(logit(values), 0).confidence_interval(0.95)
        row = [found.interval != found.distribution.interval]
        for low, high in (found.interval, expit([logits.low, logits.high])):
            row += [low <= mean <= high, high - low]
        rows.append(row)
    is_cut, *measured = np.mean(rows, axis=0)
    return [float(number) for number in (*measured, is_cut)]


def cover_both(seeds: int, examples: int, repeats: int) -> list[float]:
    rng, hits = np.random.default_rng(1), []
    for _ in range(repeats):
        hardness = rng.normal(0, 10, examples)
        scores, values = {}, {}
        for arm in "ab":
            for seed in range(seeds):
                own = hardness + rng.normal(0, 1) + rng.normal(0, 2, examples)
                rows = tuple(map(str, range(examples)))
                scores[arm, seed] = ExampleScores(rows=rows, scores=own, weights=np.ones(examples), groups=rows)
                values[arm, seed] = float(own.mean())
        confirmed = build_scores(values, scores, draws=1000)
        single, pair = estimate_sum(confirmed, {"a": 1.0}), estimate_sum(confirmed, {"a": 1.0, "b": -1.0})
        own = np.array([scores["a", seed].scores for seed in range(seeds)])
        intervals = [bootstrap_both(own, rng), *(found.interval for found in (single, pair) if found)]
        hits.append([holds(interval) for interval in intervals])
    return [float(share) for share in np.mean(hits, axis=0)]


def cover_groups(seeds: int, groups: int, repeats: int, *, are_uneven: bool, with_groups: bool = True) -> list[float]:
    """Returns how often the intervals of a mean and of a difference contain the true value.

    Without groups, examples are taken as independent.
    """
    rng, hits = np.random.default_rng(2), []
    for _ in range(repeats):
        sizes = 1 + rng.lognormal(2, 1, groups).astype(int) if are_uneven else rng.integers(5, 41, groups)
        group_of_example = np.repeat(np.arange(groups), sizes)
        count = len(group_of_example)
        rows, names = tuple(map(str, range(count))), tuple(map(str, group_of_example))
        hardness = rng.normal(0, 4, groups)[group_of_example] + rng.normal(0, 4, count)
        scores, values = {}, {}
        for arm in "ab":
            hardness_for_arm = rng.normal(0, 2, groups)[group_of_example]
            for seed in range(seeds):
                own = hardness + hardness_for_arm + rng.normal(0, 1) + rng.normal(0, 2, count)
                scores[arm, seed] = ExampleScores(
                    rows=rows, scores=own, weights=np.ones(count), groups=names if with_groups else rows
                )
                values[arm, seed] = float(own.mean())
        confirmed = build_scores(values, scores, draws=1000)
        single, pair = estimate_sum(confirmed, {"a": 1.0}), estimate_sum(confirmed, {"a": 1.0, "b": -1.0})
        hits.append([holds(found.interval) for found in (single, pair) if found])
    return [float(share) for share in np.mean(hits, axis=0)]


def bootstrap_both(scores: np.ndarray, rng: np.random.Generator, draws: int = 1000) -> np.ndarray:
    """Returns the percentile interval of the mean of scores (seeds, examples) with both resampled (Owen 2007)."""
    seeds, examples = scores.shape
    means = [
        scores[rng.integers(seeds, size=seeds)][:, rng.integers(examples, size=examples)].mean() for _ in range(draws)
    ]
    return np.quantile(means, [0.025, 0.975])


def holds(interval: tuple[float, float] | np.ndarray | None) -> bool:
    return interval is not None and bool(interval[0] <= 0 <= interval[1])


if __name__ == "__main__":
    main()
