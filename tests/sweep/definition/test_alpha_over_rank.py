"""α by its multiplier, fixed or searched; the later one of the two keys counts."""

import pytest
from optuna.distributions import CategoricalDistribution

from lorasweep.config.method import ALPHA_OVER_RANK
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition


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


def test_a_multiplier_gives_alpha_by_rank_and_its_choices_are_searched_under_its_own_key(lora):
    arm = lora({"method.alpha": {"over_rank": 2}}, RANKS)
    assert [arm.compose({"method.rank": rank}).method.alpha for rank in (1, 4)] == [2, 8]
    assert arm.settings[ALPHA_OVER_RANK] == 2
    arm = lora({}, {**RANKS, "method.alpha": {"over_rank": [1, 2, 4]}})
    assert arm.space[ALPHA_OVER_RANK] == CategoricalDistribution([1, 2, 4])
    assert arm.compose({"method.rank": 4, ALPHA_OVER_RANK: 2}).method.alpha == 8


@pytest.mark.parametrize(
    ("override", "alpha"),
    [
        ("method.alpha={over_rank:3}", 12),
        ("method.alpha.over_rank=3", 12),
        ("arms.lora.method.alpha={over_rank:3}", 12),
        ("method.alpha=5", 5),
    ],
)
@pytest.mark.parametrize("before", [{}, {"method.alpha": 64}, {"method.alpha": {"over_rank": 7}}])
def test_an_override_counts_more_than_either_key_in_the_file(lora, before, override, alpha):
    assert lora(before, RANKS, override).compose({"method.rank": 4}).method.alpha == alpha


def test_an_override_may_search_what_was_fixed_and_fix_what_was_searched(lora):
    searched = lora({"method.alpha": 64}, RANKS, "method.alpha={over_rank:[1,2]}")
    assert searched.space[ALPHA_OVER_RANK] == CategoricalDistribution([1, 2])
    assert searched.compose({"method.rank": 4, ALPHA_OVER_RANK: 2}).method.alpha == 8
    ranged = lora({"method.alpha": {"over_rank": 2}}, RANKS, "method.alpha=choice(8,16)")
    assert ranged.space["method.alpha"] == CategoricalDistribution([8, 16])
    assert ranged.compose({"method.rank": 4, "method.alpha": 8}).method.alpha == 8
    fixed = lora({}, {**RANKS, "method.alpha": {"over_rank": [1, 2]}}, "method.alpha=8")
    assert (set(fixed.space), fixed.settings["method.alpha"]) == ({"method.rank"}, 8)


@pytest.mark.parametrize(
    ("settings", "space", "message"),
    [
        ({"method.alpha": {"over_rank": -1}}, {}, "`method.alpha.over_rank` must be .* got -1"),
        ({"method.alpha": {"over_rnk": 2}}, {}, "`method.alpha` must be a number, but got"),
        ({}, {"method.alpha": {"over_rank": 2}}, "the range of `method.alpha.over_rank` must be"),
        ({"method": "full", ALPHA_OVER_RANK: 2}, {}, "`method.alpha.over_rank` is not a setting"),
    ],
)
def test_a_multiplier_that_does_not_fit_is_refused(lora, settings, space, message):
    with pytest.raises(ConfigError, match=message):
        lora(settings, space)
