"""Numbers as people read them."""

import pytest

from lorasweep.wording import (
    count_decimals,
    count_percent_decimals,
    format_estimate,
    format_score,
    format_share_estimate,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.68812, "1.688"), (0.0, "0.000"), (0.001234, "0.001234"), (123456.0, "1.235e+05"), (None, "–")],
)
def test_scores_keep_the_digits_that_matter(value, text):
    assert format_score(value) == text


@pytest.mark.parametrize(
    ("scores", "texts"),
    [
        ([1.7861, 1.3351, None], ["1.786", "1.335", "–"]),
        ([1.7861, 1.37312, 1.37342], ["1.7861", "1.3731", "1.3734"]),
        ([1.3731201, 1.3731202, 1.5], ["1.373", "1.373", "1.500"]),
        ([1234.56, 1234.61], ["1234.56", "1234.61"]),
        ([0.0, 0.00012341, 0.00012342], ["0.0000", "0.00012341", "0.00012342"]),
        ([float("inf"), float("nan"), -1.0], ["inf", "nan", "-1.000"]),
    ],
)
def test_scores_that_differ_read_differently_with_at_most_six_digits(scores, texts):
    assert [format_score(score, beside=scores) for score in scores] == texts


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (1.37181, (1.36512, 1.37899), "1.372 [1.365, 1.379]"),
        (0.0361, (0.0302, 0.0420), "0.036 [0.030, 0.042]"),
        (0.0082, (-0.00031, 0.0167), "0.0082 [-0.0003, 0.0167]"),
        (71.2, (52.1, 88.8), "71 [52, 89]"),
        (1.5, (1.5, 1.5), "1.500"),
        (1.5, None, "1.500"),
        (None, None, "–"),
    ],
)
def test_estimate_has_the_decimals_that_its_interval_deserves(value, interval, text):
    assert format_estimate(value, interval) == text


def test_estimates_have_the_decimals_that_tell_them_from_what_they_exclude():
    intervals = [(1.3, 1.5), (1.365, 1.379), None, (2.0, 2.0)]
    decimals = count_decimals(intervals)
    assert decimals == 3
    assert format_estimate(1.4, (1.3, 1.5), decimals=decimals) == "1.400 [1.300, 1.500]"
    assert count_decimals([None]) is None
    interval = (0.952, 1.004)
    assert format_share_estimate(0.98, interval) == "98.0 % [95.2, 100.4]"  # 100 % is inside
    decimals = count_percent_decimals([(0.9504, 1.2)], critical=(0.95,))
    assert format_share_estimate(1.0, (0.9504, 1.2), decimals=decimals) == "100.00 % [95.04, 120.00]"


def test_a_width_that_is_a_rounding_error_adds_no_decimals():
    assert format_estimate(0.5, (0.5 - 1e-9, 0.5 + 1e-9)) == "0.500"
    assert count_decimals([(0.5, 0.5 + 1e-9), (0.7, 0.9)]) == count_decimals([(0.7, 0.9)])
    assert format_share_estimate(0.0, (-1e-9, 1e-9)) == "0 % [0, 0]"
    assert format_estimate(1e-8, (0.9e-8, 1.1e-8)).startswith("0.00000001")
