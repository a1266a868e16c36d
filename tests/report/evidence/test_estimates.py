"""Estimates pair what was measured together, and their intervals hold the truth as often as they say."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lorasweep.report.evidence.estimates import (
    ConfirmScores,
    RunExampleScores,
    build_scores,
    estimate_ratio,
    estimate_sum,
)


def plant(means, *, seeds=5, examples=0, spread=0.01):
    """Returns scores of arms with these true means: noise of seeds, and of examples that all arms share.

    `base` has one run, whose score counts for every seed.
    """
    rng = np.random.default_rng(0)
    hardness = rng.normal(0, 0.1, examples)
    values, found = {}, {}
    for arm, mean in means.items():
        for seed in range(1 if arm == "base" else seeds):
            value = mean + (0 if arm == "base" else rng.normal(0, spread))
            if examples:
                scores = value + hardness + rng.normal(0, 0.02, examples)
                value = float(scores.mean())
                rows = tuple(map(str, range(examples)))
                found[arm, seed] = RunExampleScores(rows=rows, scores=scores, weights=np.ones(examples), groups=rows)
            values[arm, seed] = value
    return build_scores(values, found, deterministic=["base"])


def estimate(scores, coefficients):
    found = estimate_sum(scores, coefficients)
    assert found is not None
    return found


def plant_weighted(num_seeds, num_groups):
    """Scores of an arm in groups of unequal weight."""
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(num_groups), rng.integers(1, 6, num_groups))
    weights, hardness = rng.uniform(1, 3, len(groups)), rng.normal(0, 0.3, num_groups)
    rows = tuple(map(str, range(len(groups))))
    found = {}
    for seed in range(num_seeds):
        scores = 1 + rng.normal(0, 0.1) + hardness[groups] + rng.normal(0, 0.2, len(groups))
        found["a", seed] = RunExampleScores(rows=rows, scores=scores, weights=weights, groups=tuple(map(str, groups)))
    return build_scores({key: one.mean for key, one in found.items()}, found)


def test_without_two_seeds_nothing_is_tested_and_without_scores_nothing_is_estimated():
    scores = build_scores({("a", 0): 1.0, ("b", 1): 1.0}, {})
    assert estimate_sum(scores, {"a": 1.0, "b": -1.0}) is None
    assert estimate_sum(scores, {"missing": 1.0}) is None
    found = estimate(plant({"a": 1.0}, seeds=1, examples=30), {"a": 1.0})
    assert found.find_interval()  # over examples alone
    assert (found.is_testable, found.p_positive, found.p_negative) == (False, 1.0, 1.0)
    assert estimate(plant({"a": 1.0}, seeds=1), {"a": 1.0}).find_interval() is None


def test_variances_are_those_of_a_plain_computation_with_loops():
    scores = plant_weighted(4, 7)
    seeds, shares = list(scores.values["a"]), list(map(float, scores.shares))
    table = [[float(value) for value in scores.values["a"][seed]] for seed in seeds]
    by_seed = [sum(share * value for share, value in zip(shares, row, strict=True)) for row in table]
    by_group = [sum(row[group] for row in table) / 4 for group in range(7)]
    mean = sum(by_seed) / 4
    of_seeds = sum((value - mean) ** 2 for value in by_seed) / (4 * 3)
    of_groups = 7 / 6 * sum((share * (value - mean)) ** 2 for share, value in zip(shares, by_group, strict=True))
    interaction = 0.0
    for seed in range(4):
        for group in range(7):
            rest = table[seed][group] - by_group[group] - by_seed[seed] + mean
            interaction += 7 / 6 * (shares[group] * rest) ** 2 / (4 * 3)
    found = estimate(scores, {"a": 1.0})
    parts = (found.seeds_variance, found.groups_variance, found.interaction_variance)
    assert parts == pytest.approx((of_seeds, of_groups, interaction))
    assert found.value == pytest.approx(mean)
    assert found.error == pytest.approx(math.sqrt(of_seeds + of_groups - interaction))


def test_over_seeds_alone_it_is_the_t_test_and_its_interval():
    values = np.array([1.31, 1.36, 1.33, 1.35, 1.30])
    scores = build_scores({("a", seed): value - 1.3 for seed, value in enumerate(values)}, {})
    expected = stats.ttest_1samp(values - 1.30, 0)
    interval = expected.confidence_interval(0.95)
    found = estimate(scores, {"a": 1.0})
    # both are closed forms of the same distribution
    assert found.find_interval() == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert 2 * min(found.p_positive, found.p_negative) == pytest.approx(expected.pvalue, rel=1e-9)
    mirrored = estimate(scores, {"a": -1.0})
    assert mirrored.p_negative == pytest.approx(found.p_positive, rel=1e-12)


def test_a_p_value_is_that_of_the_interval_whose_end_is_zero():
    scores = plant_weighted(4, 7)
    for confidence in (0.9, 0.95, 0.999):
        low, high = estimate(scores, {"a": 1.0}).find_interval(confidence) or (0.0, 0.0)
        for end in (low, high):
            moved = estimate_sum(scores, {"a": 1.0}, constant=-end)
            assert moved
            assert min(moved.p_positive, moved.p_negative) == pytest.approx((1 - confidence) / 2, abs=1e-9)


@pytest.mark.parametrize("spreads", [(0.05, 0.0, 0.0), (0.05, 0.02, 0.01), (0.05, 0.1, 0.05), (0.0, 0.1, 0.02)])
def test_a_test_is_wrong_as_rarely_as_its_level_says_whatever_part_of_the_error_is_large(spreads):
    of_seeds, of_groups, own = spreads
    rng, level, repeats, wrong = np.random.default_rng(9), 0.0105, 4000, 0
    for _ in range(repeats):
        table = rng.normal(0, of_seeds, (3, 1)) + rng.normal(0, of_groups, 60) + rng.normal(0, own, (3, 60))
        scores = ConfirmScores(
            values={"a": dict(enumerate(table))}, shares=np.full(60, 1 / 60), num_examples=60, problems=()
        )
        wrong += estimate(scores, {"a": 1.0}).p_positive < level
    assert wrong / repeats <= level + 3 * (level * (1 - level) / repeats) ** 0.5


SHARE = ({"base": 1.0, "a": -1.0}, {"base": 1.0, "full": -1.0})


def test_ratio_of_means_has_fiellers_interval():
    scores = plant({"base": 2.0, "a": 1.2, "full": 1.0}, spread=0.05)
    above, below = (2.0 - np.array(estimate_sum(scores, {name: 1.0}).values) for name in ("a", "full"))
    # Fieller's theorem for paired samples: the roots of a quadratic
    covariance = np.cov(above, below) * stats.t(4).ppf(0.975) ** 2 / 5
    middle = above.mean() * below.mean() - covariance[0, 1]
    roots = np.roots([below.mean() ** 2 - covariance[1, 1], -2 * middle, above.mean() ** 2 - covariance[0, 0]])
    ratio, interval = estimate_ratio(scores, *SHARE)
    assert ratio == pytest.approx(above.mean() / below.mean())
    assert interval == pytest.approx(tuple(sorted(roots)), rel=1e-6)


def test_ratio_of_scores_without_any_noise_is_exact_and_to_no_gain_unbounded():
    # 1.01 - 0.1 and 1.01 - 0.3 have no exact binary form, so the difference at the ratio is not exactly 0
    for score in np.linspace(0.1, 0.9, 9):
        _, interval = estimate_ratio(plant({"base": 1.01, "a": score, "full": 0.07}, spread=0.0), *SHARE)
        assert interval == pytest.approx([(1.01 - score) / (1.01 - 0.07)] * 2, abs=1e-6)
    assert estimate_ratio(plant({"base": 1.0, "a": 0.99, "full": 0.999}, spread=0.05), *SHARE)[1] is None


def test_more_seeds_shrink_the_part_of_seeds_alone():
    now = estimate(plant_weighted(4, 7), {"a": 1.0})
    same, seeds = now.project(num_seeds=4), now.project(num_seeds=8)
    assert same == replace(now, seeds=tuple(range(4)))
    both = now.interaction_variance
    assert seeds.seeds_variance == pytest.approx(now.seeds_variance / 2)
    assert seeds.groups_variance == pytest.approx(now.groups_variance - both + both / 2)
    assert len(seeds.seeds) == 8
    errors = [now.project(num_seeds=num).error for num in (4, 8, 80, 8000)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx((now.groups_variance - both) ** 0.5, rel=1e-2)


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
def test_interval_ends_where_the_metric_ends(score_range, arms, values, interval):
    rows = {("a", seed): value for seed, value in enumerate(values)} | {("b", seed): 0.0 for seed in range(len(values))}
    found = estimate(build_scores(rows, {}, score_range=score_range), arms)
    assert found.find_interval() == pytest.approx(interval, abs=1e-3)  # as many digits as the table of Student's t


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_examples_that_all_have_the_best_or_the_worst_score_give_no_interval(score):
    rows = ("1", "2")
    of_run = RunExampleScores(rows=rows, scores=np.full(2, score), weights=np.ones(2), groups=rows)
    examples = {("a", 0): of_run}
    scores = build_scores({("a", 0): score}, examples, score_range=(0.0, 1.0))
    assert estimate(scores, {"a": 1.0}).find_interval() is None


@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-17])
def test_a_part_of_the_error_that_is_next_to_nothing_changes_nothing(spread):
    table = np.array([1.0, 1.1, 1.3])[:, None] + spread * np.arange(5)
    scores = ConfirmScores(values={"a": dict(enumerate(table))}, shares=np.full(5, 0.2), num_examples=5, problems=())
    interval = stats.t(2, loc=table.mean(), scale=stats.sem(table[:, 0])).interval(0.95)
    assert estimate(scores, {"a": 1.0}).find_interval() == pytest.approx(interval, rel=1e-6)
