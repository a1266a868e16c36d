"""The confidence distribution equals textbook results where there are any, and lies between them elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lorasweep.report.evidence.confidence import ConfidenceDistribution, estimate_mean

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


def test_minimum_detectable_difference_is_that_of_the_power_of_the_t_test() -> None:
    seeds, spread = 5, 0.02
    found = ConfidenceDistribution(
        estimate=0.0, seed_error=spread / math.sqrt(seeds), degrees_of_freedom=seeds - 1, deviations=np.zeros(1)
    )
    size = found.minimum_detectable(0.05)
    critical = stats.t.ppf(0.975, seeds - 1)
    power = 1 - stats.nct.cdf(critical, seeds - 1, size * math.sqrt(seeds) / spread)
    # both come from the noncentral t distribution
    assert power == pytest.approx(0.8, abs=1e-6)
    assert found.minimum_detectable(0.01) > size
