"""Measures how often 95 % intervals contain the true value, on invented scores of few seeds and many examples.

Arms have seed noise of standard deviation 1 and, in the second table, examples whose difficulty has standard deviation
10. "difference" is that of two equal arms on the same seeds and examples, so that difficulty cancels.

In the third table examples come in groups, such as the blocks of a document. A group has a difficulty of standard
deviation 4, and a difficulty for each arm alone of standard deviation 2. Groups have 5 to 40 examples, or uneven sizes:
lognormal with standard deviation 1, as uneven as Python's documentation. Each repeat draws other seeds and groups.

    python benchmarks/bench_intervals.py --repeats 1000
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np
from scipy import stats

from lorasweep.report.evidence.estimates import estimate_sum
from lorasweep.report.evidence.scores import ExampleScores, build_scores


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
