"""Planned looks share their level: the chance of a false verdict at any of them is that of one test."""

import numpy as np
import pytest
from scipy.stats import norm

from lorasweep.report.evidence.questions import compute_look_level

POCOCK = [(2, 2.178), (3, 2.289), (5, 2.413)]
"""Numbers of equally spaced looks, and Pocock's constants for a two-sided level of 5 % (Pocock 1977, table 1)."""


@pytest.mark.parametrize(("num_looks", "boundary"), POCOCK)
def test_boundaries_of_equal_looks_are_pococks(num_looks, boundary):
    level = compute_look_level(tuple(range(2, 2 * num_looks + 1, 2)), level=0.025)
    assert norm.isf(level) == pytest.approx(boundary, abs=1e-3)  # the table has three decimals


@pytest.mark.parametrize("level", [0.025, 0.025 / 8])
def test_paths_without_a_difference_cross_the_boundary_with_the_level(level):
    looks, num_paths = (3, 6, 10), 200_000
    boundary = norm.isf(compute_look_level(looks, level=level))
    sums = np.random.default_rng(0).standard_normal((num_paths, looks[-1])).cumsum(axis=1)
    crossed = np.mean(np.any([sums[:, look - 1] > boundary * look**0.5 for look in looks], axis=0))
    assert crossed == pytest.approx(level, abs=4 * (level / num_paths) ** 0.5)  # 4 standard errors
