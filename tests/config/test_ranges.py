"""The ends and the width of a swept range, in the form of a sweep file."""

import math

import pytest

from lorasweep.config.ranges import Bounds, find_bounds, width_in_decades


@pytest.mark.parametrize(
    ("swept", "bounds"),
    [
        ([4, 1, 16], Bounds(low=1, high=16, is_log=False)),
        ({"low": 1e-4, "high": 1e-2, "log": True}, Bounds(low=1e-4, high=1e-2, is_log=True)),
        ({"low": 0, "high": 0.1, "log": False}, Bounds(low=0, high=0.1, is_log=False)),
        ([8], None),
        (["a", "b"], None),
        ([True, False], None),
        ([1, None], None),
        ([1, math.nan], None),
        ([1, 10**400], None),
        ({"low": 1}, None),
        ([[1], [2]], None),
        (None, None),
    ],
)
def test_bounds_are_the_smallest_and_the_largest_number(swept, bounds):
    assert find_bounds(swept) == bounds


@pytest.mark.parametrize(
    ("swept", "width"),
    [
        ({"low": 1e-3, "high": 3e-2, "log": True}, math.log10(30)),
        ([1, 2, 4, 8, 16, 32], math.log10(32)),
        ([0, 1], None),
        (["a"], None),
    ],
)
def test_width_is_the_logarithm_of_the_largest_over_the_smallest(swept, width):
    # abs: two logarithms of about 1 are each rounded to 1e-16
    assert width_in_decades(swept) == (None if width is None else pytest.approx(width, abs=1e-14))
