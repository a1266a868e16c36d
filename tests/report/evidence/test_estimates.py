"""Estimates pair what was measured together, and their intervals hold the truth as often as they say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lorasweep.report.evidence.estimates import ConfidenceDistribution, estimate_mean, estimate_ratio, estimate_sum
from lorasweep.report.evidence.scores import UNBOUNDED, build_scores

from .conftest import plant


def covers(interval: tuple[float, float] | None, truth: float) -> bool:
    assert interval
    return interval[0] <= truth <= interval[1]


def test_difference_is_taken_seed_by_seed() -> None:
    values = {("a", 0): 1.0, ("a", 1): 2.0, ("a", 2): 9.0, ("b", 0): 1.1, ("b", 1): 2.2, ("b", 7): 5.0}
    found = estimate_sum(build_scores(values, {}), {"a": 1.0, "b": -1.0})
    assert found
    assert found.seeds == (0, 1)
    assert found.values == pytest.approx((-0.1, -0.2))


def test_what_is_common_to_seeds_and_examples_cancels_in_a_difference() -> None:
    scores = plant({"a": 1.0, "b": 1.5}, examples=60, seed_spread=0.001, example_spread=1.0, own_spread=0.001)
    single, difference = estimate_sum(scores, {"a": 1.0}), estimate_sum(scores, {"a": 1.0, "b": -1.0})
    assert single
    assert difference
    widths = [high - low for low, high in (found.interval or (0, 0) for found in (single, difference))]
    assert widths[1] < widths[0] / 50


def test_the_frozen_base_stands_beside_every_seed() -> None:
    scores = plant({"base": 2.0, "a": 1.0}, deterministic=frozenset({"base"}))
    found = estimate_sum(scores, {"base": 1.0, "a": -1.0})
    alone = estimate_sum(scores, {"base": 1.0})
    assert found
    assert alone
    assert found.seeds == (0, 1, 2, 3, 4)
    assert alone.interval == (2.0, 2.0)
    assert alone.is_testable


def test_no_common_seed_or_no_score_gives_no_estimate() -> None:
    scores = build_scores({("a", 0): 1.0, ("b", 1): 1.0}, {})
    assert estimate_sum(scores, {"a": 1.0, "b": -1.0}) is None
    assert estimate_sum(scores, {"missing": 1.0}) is None


def test_one_seed_has_an_interval_over_examples_alone_and_is_not_testable() -> None:
    found = estimate_sum(plant({"a": 1.0}, seeds=1, examples=30), {"a": 1.0})
    assert found
    assert found.interval
    assert not found.is_testable
    bare = estimate_sum(plant({"a": 1.0}, seeds=1), {"a": 1.0})
    assert bare
    assert bare.interval is None


def test_examples_are_used_only_where_every_run_has_them() -> None:
    scores = plant({"a": 1.0, "b": 1.0}, examples=20)
    partial = replace(scores, deviations={key: v for key, v in scores.deviations.items() if key != ("b", 3)})
    uses = [estimate_sum(partial, {arm: 1.0}) for arm in ("a", "b")]
    assert [found.uses_examples for found in uses if found] == [True, False]


def test_intervals_over_seeds_hold_the_truth_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(5)
    hits = [covers(estimate_sum(plant({"a": 1.0}, rng=rng), {"a": 1.0}).interval, 1.0) for _ in range(1000)]  # type: ignore[union-attr]
    # the binomial's standard error is 0.7 %
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_over_seeds_and_examples_hold_the_truth_in_at_least_95_of_100_cases(seeds: int) -> None:
    rng, hits = np.random.default_rng(6), []
    for _ in range(300):
        scores = plant({"a": 1.0}, seeds=seeds, examples=60, seed_spread=0.02, example_spread=0.1, rng=rng, draws=250)
        found = estimate_sum(scores, {"a": 1.0})
        hits.append(covers(found.interval if found else None, 1.0))
    # the sum of two errors, one of them with few degrees of freedom, is on the safe side; 1.3 % is the standard error
    assert 0.93 <= np.mean(hits) <= 0.99


def test_ratio_of_means_has_fiellers_interval() -> None:
    scores = plant({"base": 2.0, "a": 1.2, "full": 1.0}, deterministic=frozenset({"base"}), seed_spread=0.05)
    found = estimate_ratio(scores, {"base": 1.0, "a": -1.0}, {"base": 1.0, "full": -1.0})
    above = 2.0 - np.array(list(scores.values["a"].values()))
    below = 2.0 - np.array(list(scores.values["full"].values()))
    # Fieller's theorem for paired samples: the roots of a quadratic
    n, t = 5, 2.7764451051977987
    covariance = np.cov(above, below) * t**2 / n
    roots = np.roots(
        [
            below.mean() ** 2 - covariance[1, 1],
            -2 * (above.mean() * below.mean() - covariance[0, 1]),
            above.mean() ** 2 - covariance[0, 0],
        ]
    )
    assert found
    assert found[0] == pytest.approx(above.mean() / below.mean())
    assert found[1] == pytest.approx(tuple(sorted(roots)), rel=1e-6)


def test_ratio_to_a_gain_that_may_be_none_has_no_interval() -> None:
    scores = plant({"base": 1.0, "a": 0.99, "full": 0.999}, deterministic=frozenset({"base"}), seed_spread=0.05)
    found = estimate_ratio(scores, {"base": 1.0, "a": -1.0}, {"base": 1.0, "full": -1.0})
    assert found
    assert found[1] is None


def test_intervals_of_a_ratio_hold_the_truth_in_95_of_100_cases() -> None:
    rng, hits = np.random.default_rng(8), []
    for _ in range(200):
        scores = plant(
            {"base": 2.0, "a": 1.2, "full": 1.0}, deterministic=frozenset({"base"}), seed_spread=0.1, rng=rng
        )
        found = estimate_ratio(scores, {"base": 1.0, "a": -1.0}, {"base": 1.0, "full": -1.0})
        hits.append(covers(found[1] if found else None, 0.8))
    # the binomial's standard error is 1.5 %
    assert np.mean(hits) == pytest.approx(0.95, abs=0.04)


VALUES = np.array([1.31, 1.36, 1.33, 1.35, 1.30])
SKEWED = np.random.default_rng(3).exponential(0.02, 2000) - 0.02


def both() -> ConfidenceDistribution:
    found = estimate_mean(VALUES, SKEWED)
    assert found
    return found


def test_over_seeds_alone_it_is_the_t_interval_and_the_t_test() -> None:
    found = estimate_mean(VALUES, None)
    expected = stats.ttest_1samp(VALUES - 1.30, 0)
    interval = expected.confidence_interval(0.95)
    shifted = estimate_mean(VALUES - 1.30, None)
    assert found
    assert shifted
    # both are closed forms of the same distribution
    assert shifted.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert shifted.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval == pytest.approx((interval.low + 1.30, interval.high + 1.30), rel=1e-9)


def test_over_examples_alone_it_is_the_percentile_bootstrap() -> None:
    found = estimate_mean(np.array([1.0]), SKEWED, varies_by_seed=False)
    assert found
    assert found.interval == pytest.approx(tuple(1.0 + np.quantile(SKEWED, [0.025, 0.975])))


def test_of_both_it_is_wider_than_each_and_not_wider_than_their_sum() -> None:
    seeds, examples = (
        estimate_mean(VALUES, None),
        estimate_mean(VALUES.mean(keepdims=True), SKEWED, varies_by_seed=False),
    )
    assert seeds
    assert examples
    widths = [high - low for low, high in (seeds.interval, examples.interval, both().interval)]
    assert max(widths[:2]) < widths[2] < sum(widths[:2])


def test_quantile_is_the_inverse_of_cdf() -> None:
    for confidence in (0.001, 0.025, 0.3, 0.5, 0.975, 0.9999):
        # the root is found to 1e-12, and the density is at most some dozens
        assert both().cdf(both().quantile(confidence)) == pytest.approx(confidence, abs=1e-9)


def test_p_value_is_that_of_the_interval_whose_end_is_zero() -> None:
    low, _ = both().interval
    moved = estimate_mean(VALUES - low, SKEWED)
    assert moved
    assert moved.p_value == pytest.approx(0.05, abs=1e-9)


def test_p_value_is_the_same_for_the_negated_estimate() -> None:
    mirrored = estimate_mean(-VALUES, -SKEWED)
    assert mirrored
    # far in the tail, where 1 - p would have rounded it to 0
    assert 0 < mirrored.p_value < 1e-4
    assert mirrored.p_value == pytest.approx(both().p_value, rel=1e-12)


def test_bootstrap_never_says_that_something_is_impossible() -> None:
    found = estimate_mean(np.array([5.0]), SKEWED, varies_by_seed=False)
    assert found
    assert found.p_value == pytest.approx(2 / 2002)


def test_one_seed_without_examples_says_nothing() -> None:
    assert estimate_mean(VALUES[:1], None) is None


def test_where_nothing_is_left_to_chance_there_is_a_point() -> None:
    found = estimate_mean(np.array([1.5]), None, varies_by_seed=False)
    assert found
    assert found.interval == (1.5, 1.5)
    assert found.p_value == 0
    zero = estimate_mean(np.zeros(1), None, varies_by_seed=False)
    assert zero
    assert zero.p_value == 1


@pytest.mark.parametrize(
    ("score_range", "arms", "values", "interval"),
    [
        ((0.0, 1.0), {"a": 1.0}, (0.635, 0.745), (0.0, 1.0)),
        ((0.0, 1.0), {"a": 1.0}, (0.99, 0.97, 0.98), (0.98 - 0.0248, 1.0)),
        ((0.0, 1.0), {"a": 1.0, "b": -1.0}, (0.9, 0.5), (-1.0, 1.0)),
        ((0.0, math.inf), {"a": 1.0}, (0.1, 0.3), (0.0, 0.2 + 1.2706)),
        ((0.0, math.inf), {"a": 1.0, "b": -1.0}, (0.1, 0.3), (0.2 - 1.2706, 0.2 + 1.2706)),
        ((1.0, math.inf), {"a": 1.0}, (1.1, 1.3), (1.0, 1.2 + 1.2706)),
    ],
)
def test_interval_ends_where_the_metric_ends(
    score_range: tuple[float, float], arms: dict[str, float], values: tuple[float, ...], interval: tuple[float, float]
) -> None:
    rows = {("a", seed): value for seed, value in enumerate(values)} | {("b", seed): 0.0 for seed in range(len(values))}
    found = estimate_sum(build_scores(rows, {}, score_range=score_range), arms)
    assert found
    assert found.interval == pytest.approx(interval, abs=1e-3)  # as many digits as the table of Student's t


def test_cut_interval_does_not_change_a_test() -> None:
    values = {("a", 0): 0.99, ("a", 1): 0.90, ("b", 0): 0.93, ("b", 1): 0.85}
    whole, cut = (
        estimate_sum(build_scores(values, {}, score_range=score_range), {"a": 1.0, "b": -1.0})
        for score_range in (UNBOUNDED, (0.0, 1.0))
    )
    assert whole
    assert cut
    assert whole.tested
    assert cut.tested
    assert cut.tested.p_value == whole.tested.p_value


def test_a_constant_moves_the_bounds_of_a_sum() -> None:
    scores = build_scores({("a", 0): 0.4, ("a", 1): 0.6}, {}, score_range=(0.0, 1.0))
    found = estimate_sum(scores, {"a": -2.0}, constant=0.5)
    assert found
    assert found.bounds == (-1.5, 0.5)
