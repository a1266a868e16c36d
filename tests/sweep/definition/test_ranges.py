"""A range is read from a list or bounds, and described as it was written; a wrong one is refused by key and value."""

import math

import pytest

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.ranges import Range

WHOLE, REAL = "method.rank", "optim.lr"


def refuse(key, value, words):
    with pytest.raises(ConfigError) as raised:
        Range.parse(key, value)
    assert [word for word in (f"`{key}`", *words) if word not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("value", "key", "expected"),
    [
        ([1, 4, 16], WHOLE, Range(choices=[1, 4, 16])),
        (["lora", None, True], REAL, Range(choices=["lora", None, True])),
        ({"low": 1e-4, "high": 1e-2, "log": True}, REAL, Range(low=1e-4, high=1e-2, log=True)),
        ({"low": 0.0, "high": 1.0, "step": 0.25}, REAL, Range(low=0.0, high=1.0, step=0.25)),
        ({"low": 2, "high": 8, "step": 2}, WHOLE, Range(low=2, high=8, step=2, is_whole=True)),
        ({"low": 1, "high": 64, "log": True}, WHOLE, Range(low=1, high=64, log=True, is_whole=True)),
    ],
)
def test_a_range_is_described_as_it_was_written(value, key, expected):
    parsed = Range.parse(key, value)
    assert parsed == expected
    assert Range.parse(key, parsed.describe()) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([[1], [2]], ["a number, a text", "[1]"]),
        ([math.nan], ["a number, a text", "nan"]),
        ("1..3", ["a list of choices", "'1..3'"]),
        ({"low": 1, "high": 2, "hihg": 2}, ["'hihg'", "`high`"]),
        ({"low": True, "high": 2}, ["`low`", "True", "number"]),
        ({"low": 0, "high": math.inf}, ["`high`", "inf", "number"]),
        ({"low": 1, "high": 2, "log": "no"}, ["`log: true`", "'no'"]),
        ({"low": 1, "high": 9, "log": True, "step": 2}, ["log"]),
        ({"low": 1, "high": 2, "step": 3}, ["not divisible by `step`"]),
    ],
)
def test_a_wrong_range_is_refused(value, words):
    for key in (WHOLE, REAL):
        refuse(key, value, words)


@pytest.mark.parametrize("value", [{"low": 0.5, "high": 2}, {"low": 1, "high": 3, "step": 0.5}])
def test_a_range_of_whole_numbers_has_whole_bounds_and_steps(value):
    refuse(WHOLE, value, ["a whole number", "0.5"])
