"""The slope of a share of full's gain over the amount of training data, with its interval."""

import numpy as np
import pytest

from lorasweep.report.evidence.estimates import ConfirmScores, estimate_ratio
from lorasweep.report.evidence.evidence import Evidence
from lorasweep.report.evidence.growth import estimate_slopes

GROUPS = 40


def plant(rng, means, *, seeds, of_seeds, of_groups, own):
    """Returns the scores of a sweep whose subjects share the effects of seeds and groups that are given."""
    return ConfirmScores(
        values={
            name: dict(enumerate(mean + seeds * of_seeds[name] + of_groups + rng.normal(0, own, (len(seeds), GROUPS))))
            for name, mean in means.items()
        },
        shares=np.full(GROUPS, 1 / GROUPS),
        num_examples=GROUPS,
        problems=(),
    )


def collect(scores):
    gain = {"base": 1.0, "full": -1.0}
    shares = {"full": (1.0, None), "a": estimate_ratio(scores, {"base": 1.0, "a": -1.0}, gain)}
    return Evidence(shares=shares, base="base", full="full", scores=scores)


def plant_sweeps(rng, *, others=None):
    """Returns two sweeps on the same seeds and test documents, in which `a` keeps 80 % and then 70 % of a gain of 1."""
    seeds, hardness = rng.normal(0, 0.05, (3, 1)), rng.normal(0, 0.3, GROUPS)
    effects = {"base": 0.0, "full": 1.0, "a": 1.0}
    sweeps = []
    for share, place in ((0.8, 0), (0.7, 1)):
        means = {"base": 3.0, "full": 2.0, "a": 3.0 - share}
        if others and place:
            seeds, hardness = rng.normal(0, 0.05, (3, 1)), rng.normal(0, 0.3, GROUPS)
        sweeps.append(plant(rng, means, seeds=seeds, of_seeds=effects, of_groups=hardness, own=0.05))
    return [collect(scores) for scores in sweeps]


def test_the_slope_is_the_difference_for_each_doubling():
    sweeps = plant_sweeps(np.random.default_rng(3))
    (slope,) = estimate_slopes(sweeps, [100, 400], sign=1).values()
    first, last = (one.shares["a"][0] for one in sweeps)
    assert slope.value == pytest.approx((last - first) / 2)  # 400 is two doublings of 100
    mirrored = estimate_slopes(sweeps[::-1], [400, 100], sign=1)["a"]
    assert (mirrored.value, mirrored.interval) == (pytest.approx(slope.value), pytest.approx(slope.interval))


def test_the_interval_covers_the_true_slope_and_uses_what_the_sweeps_share():
    rng, repeats, covered, widths, apart = np.random.default_rng(5), 400, 0, [], []
    for _ in range(repeats):
        low, high = estimate_slopes(plant_sweeps(rng), [100, 200], sign=1)["a"].interval
        covered += low <= -0.1 <= high
        widths.append(high - low)
        apart.append(np.subtract(*estimate_slopes(plant_sweeps(rng, others=True), [100, 200], sign=1)["a"].interval))
    # 3 standard errors of a share of 95 %; the interval may be too wide, because each part counts whole
    assert covered / repeats >= 0.95 - 3 * (0.95 * 0.05 / repeats) ** 0.5
    # sweeps on seeds of their own would scatter more: their seeds' effect does not cancel
    assert np.median(widths) < 0.8 * -np.median(apart)


def test_no_slope_without_the_same_test_documents_or_a_shown_gain():
    one, other = plant_sweeps(np.random.default_rng(3))
    moved = ConfirmScores(
        values=other.scores.values, shares=np.roll(np.linspace(1, 2, GROUPS), 1) / 60, num_examples=GROUPS, problems=()
    )
    assert (
        estimate_slopes([one, Evidence(shares=other.shares, base="base", full="full", scores=moved)], [1, 2], sign=1)
        == {}
    )
    assert estimate_slopes([one, Evidence(shares={"a": (0.5, None)}, scores=other.scores)], [1, 2], sign=1) == {}
