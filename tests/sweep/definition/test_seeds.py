"""The confirm stage's seeds are fresh, the same for every arm, and stay what they are when there are more."""

from __future__ import annotations

import pytest

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.seeds import draw_confirm_seeds, has_fixed_score


@pytest.fixture
def define(write_file, three_arms):
    return lambda *overrides: read_definition(write_file(three_arms), overrides)


def test_seeds_depend_on_the_sweeps_seed_and_their_number_alone(define):
    five = draw_confirm_seeds(define("confirm.seeds=5"))
    assert len(set(five)) == 5
    assert all(0 <= seed < 1_000_000 for seed in five)
    assert draw_confirm_seeds(define("confirm.seeds=5", "arms.lora.trials=9")) == five
    assert draw_confirm_seeds(define("confirm.seeds=8"))[:5] == five
    assert set(draw_confirm_seeds(define("confirm.seeds=5", "sweep.seed=1"))).isdisjoint(five)
    assert draw_confirm_seeds(define("confirm.seeds=0")) == []


def test_by_default_there_are_seeds_for_every_look(three_arms, write_file):
    del three_arms["settings"]["confirm.seeds"]
    definition = read_definition(write_file(three_arms), [])
    looks = definition.sweep_config.confirm.list_looks()
    assert len(looks) > 1
    assert len(draw_confirm_seeds(definition)) == looks[-1]


@pytest.mark.parametrize("key", ["seed", "seeds.init", "seeds.data_order", "seeds.dropout"])
def test_a_seed_of_the_search_is_not_used_again(define, key):
    first, second, *_ = draw_confirm_seeds(define("confirm.seeds=5"))
    fixed = draw_confirm_seeds(define("confirm.seeds=5", f"arms.lora.{key}={first}"))
    searched = draw_confirm_seeds(define("confirm.seeds=5", f"arms.lora.{key}=choice(1,{first})"))
    ranged = draw_confirm_seeds(define("confirm.seeds=5", f"arms.lora.{key}=interval({first - 1},{first + 1})"))
    for seeds in (fixed, searched, ranged):
        assert first not in seeds
        assert seeds[0] == second
        assert len(set(seeds)) == 5


def test_a_search_that_leaves_no_seed_is_refused(define):
    with pytest.raises(ConfigError, match=r"`confirm.seeds` needs 5 seeds.*Narrow the range of `seed`"):
        draw_confirm_seeds(define("confirm.seeds=5", "arms.lora.seed=interval(0,4294967295)"))


def test_seeds_make_no_difference_to_the_frozen_base_of_a_language_model_alone(define):
    fixed = {arm.name: has_fixed_score(arm) for arm in define().arms}
    assert fixed.pop("frozen")
    assert not any(fixed.values())
