"""Ranges become Optuna's distributions. An empty or wrong range is refused with its key."""

import math

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.sweep_file import describe_space, parse_range


@pytest.mark.parametrize(
    ("value", "whole", "expected"),
    [
        ([1, 4, 16], True, CategoricalDistribution([1, 4, 16])),
        (["lora", None, True], False, CategoricalDistribution(["lora", None, True])),
        ({"low": 1e-4, "high": 1e-2, "log": True}, False, FloatDistribution(1e-4, 1e-2, log=True)),
        ({"low": 0.0, "high": 1.0, "step": 0.25}, False, FloatDistribution(0.0, 1.0, step=0.25)),
        ({"low": 1, "high": 8}, True, IntDistribution(1, 8)),
        ({"low": 1.0, "high": 8.0}, True, IntDistribution(1, 8)),
        ({"low": 1, "high": 64, "log": True}, True, IntDistribution(1, 64, log=True)),
    ],
)
def test_a_range_becomes_a_distribution(value, whole, expected):
    assert parse_range("k", value, is_whole=whole) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"`k` must have at least one choice.*\[\]"),
        ([[1], [2]], r"`k` must be a number, .*\[1\]"),
        ([math.nan], "`k` must be a number, .*nan"),
        ("1..3", "`k` must be a list of choices.*'1..3'"),
        ({"low": 1, "high": 2, "hihg": 2}, r"`k` must be .* Did you mean `high`\?"),
        ({"low": 1}, r"`k` must be .*\{'low': 1\}"),
        ({"low": True, "high": 2}, "`k` must have .*`low`.*True"),
        ({"low": 0, "high": math.inf}, "`k` must have .*`high`.*inf"),
        ({"low": 2, "high": 1}, "`k` .*`low <= high` must hold"),
        ({"low": 1, "high": 2, "log": "no"}, "`k` must be .*`log: true`.*'no'"),
        ({"low": 1, "high": 9, "log": True, "step": 2}, "`k` .*`log"),
        ({"low": 1, "high": 2, "step": 3}, "`k` .*not divisible by `step`"),
    ],
)
def test_a_wrong_range_is_refused(value, message):
    for whole in (True, False):
        with pytest.raises(ConfigError, match=message):
            parse_range("k", value, is_whole=whole)


@pytest.mark.parametrize("value", [{"low": 0.5, "high": 2}, {"low": 1, "high": 3, "step": 0.5}])
def test_a_range_of_whole_numbers_has_whole_bounds_and_steps(value):
    with pytest.raises(ConfigError, match=r"`k` must have a whole number as `(low|step)`, but got 0.5."):
        parse_range("k", value, is_whole=True)


def test_a_described_space_reads_as_the_same_space():
    space = {
        "a": CategoricalDistribution([1, 4]),
        "b": FloatDistribution(1e-4, 1e-2, log=True),
        "c": IntDistribution(2, 8, step=2),
        "d": FloatDistribution(0.0, 1.0),
        "e": FloatDistribution(0.0, 4.0, step=1.0),
        "f": IntDistribution(1, 64, log=True),
    }
    described = describe_space(space)
    assert {key: parse_range(key, value, is_whole=key in "cf") for key, value in described.items()} == space


@pytest.fixture
def lora(write_file, content):
    """Reads a sweep of which the LoRA arm has these settings and space; returns that arm."""

    def read(settings, space, *overrides):
        trials = {} if space else {"trials": 1}
        content["arms"]["lora"] |= {"settings": {"method": "lora", **settings}, "space": space, **trials}
        arms = read_definition(write_file(content), overrides).arms
        return next(arm for arm in arms if arm.name == "lora")

    return read


RANKS = {"method.rank": [1, 4]}


def test_an_override_may_search_what_was_fixed_and_fix_what_was_searched(lora):
    searched = lora({"method.alpha": 64}, RANKS, "method.alpha=choice(8,16)")
    assert searched.space["method.alpha"] == CategoricalDistribution([8, 16])
    assert searched.compose({"method.rank": 4, "method.alpha": 8}).method.alpha == 8
    fixed = lora({}, {**RANKS, "method.alpha": [8, 16]}, "method.alpha=8")
    assert (set(fixed.space), fixed.settings["method.alpha"]) == ({"method.rank"}, 8)
