"""Questions follow from the arms alone; confirm seeds are fresh; what makes a comparison less fair is warned of."""

import pytest

from lorasweep.record import read_sweep
from lorasweep.sweep.definition.confirm import draw_confirm_seeds, find_warnings, has_fixed_score, list_questions

RANKS = ["lora-rank-1", "lora-rank-2", "lora-rank-4"]
OTHER = {"settings": {"method": "lora", "method.rank": 2}, "space": {"optim.lr": [0.01, 0.02]}, "trials": 2}


@pytest.fixture
def ask(read):
    """Returns each question's name, subjects and reference."""
    return lambda content, *overrides: [
        (question.name, question.subjects, question.reference) for question in list_questions(read(content, *overrides))
    ]


def test_each_arm_or_value_is_compared_with_full_and_the_smallest_is_asked_for_where_it_costs_less(ask, content):
    content["arms"]["lora"] |= {"space": {"method.rank": [1, 2, 4]}, "confirm_each": "method.rank"}
    assert ask(content) == [("as_good_as_full", RANKS, "full"), ("smallest", RANKS, None)]
    content["arms"]["lora"] |= {"space": {"method.alpha": [8, 16]}, "confirm_each": "method.alpha"}
    assert [name for name, _, _ in ask(content)] == ["as_good_as_full"]
    content["arms"]["lora"]["confirm_each"] = None
    content["arms"]["other"] = OTHER
    assert ask(content) == [("as_good_as_full", ["lora"], "full"), ("as_good_as_full", ["other"], "full")]


def test_without_full_other_arms_are_compared_with_the_first_that_trains(ask, content):
    content["arms"].pop("full")
    assert ask(content) == []
    content["arms"]["other"] = OTHER
    assert ask(content) == [("pair", ["other"], "lora")]
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    assert ask(content) == [("smallest", RANKS, None), ("pair", ["other"], "lora-rank-4")]


def test_questions_and_looks_are_in_the_record_before_the_first_trial(begin, content):
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    folder = begin(content, "confirm.seeds=[2,4]")
    folder.close()
    record = read_sweep(folder.path)
    assert [question.name for question in record.questions] == ["as_good_as_full", "smallest"]
    assert (record.looks, len(record.confirm_seeds), record.trials) == ([2, 4], 4, [])
    assert {arm.name: arm.key for arm in record.arms} == {"frozen": None, "full": None, "lora": "method.rank"}


@pytest.fixture
def define(read, content):
    return lambda *overrides: read(content, *overrides)


def test_seeds_depend_on_the_sweeps_seed_and_their_number_alone(define):
    five = draw_confirm_seeds(define("confirm.seeds=5"))
    assert len(set(five)) == 5
    assert all(0 <= seed < 1_000_000 for seed in five)
    assert draw_confirm_seeds(define("confirm.seeds=5", "arms.lora.trials=9")) == five
    assert draw_confirm_seeds(define("confirm.seeds=8"))[:5] == five
    assert set(draw_confirm_seeds(define("confirm.seeds=5", "sweep.seed=1"))).isdisjoint(five)
    assert draw_confirm_seeds(define("confirm.seeds=0")) == []
    default = define("confirm.seeds=[3,6,10]")
    assert len(draw_confirm_seeds(default)) == default.sweep_config.confirm.list_looks()[-1]


@pytest.mark.parametrize("key", ["seed", "seeds.init", "seeds.data_order", "seeds.dropout"])
def test_a_seed_of_the_search_is_not_used_again(define, key):
    first, second, *_ = draw_confirm_seeds(define("confirm.seeds=5"))
    fixed = draw_confirm_seeds(define("confirm.seeds=5", f"arms.lora.{key}={first}"))
    searched = draw_confirm_seeds(define("confirm.seeds=5", f"arms.lora.{key}=choice(1,{first})"))
    for seeds in (fixed, searched):
        assert first not in seeds
        assert seeds[0] == second
        assert len(set(seeds)) == 5


def test_seeds_make_no_difference_to_the_frozen_base_of_a_language_model_alone(define):
    fixed = {arm.name: has_fixed_score(arm) for arm in define().arms}
    assert fixed.pop("frozen")
    assert not any(fixed.values())


@pytest.mark.parametrize(
    ("change", "overrides", "start"),
    [
        ({}, ["arms.lora.trainer.max_steps=10"], "Arms train on unequal numbers of tokens per trial"),
        ({}, ["arms.lora.trainer.max_steps=9"], None),
        ({}, ["confirm.seeds=1"], "`confirm.seeds` is 1"),
        ({}, ["confirm.seeds=3"], None),
        ({}, ["arms.lora.trials=20"], None),  # an arm with more dimensions needs more trials
        ({"full": None}, ["confirm.seeds=3"], None),  # a share of the best arm's gain
        ({"frozen": None}, ["confirm.seeds=3"], "`confirm.margin` is 5%"),
        ({"full": None}, ["confirm.seeds=0"], None),
        ({"full": None, "other": OTHER}, ["confirm.seeds=3", "confirm.margin=0.01"], None),
        ({}, ["confirm.seeds=3", "method.alpha=33"], "lora reaches a factor on B A (such as α/r) above 16"),
        ({}, ["confirm.seeds=3", "method.alpha=33", "optim=sgd"], None),  # its rate is searched as it is
    ],
)
def test_what_makes_a_comparison_less_fair_or_certain_is_warned_of(read, content, change, overrides, start):
    arms = {**content["arms"], **change}
    content["arms"] = {name: arm for name, arm in arms.items() if arm is not None}
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    warnings = find_warnings(read(content, *overrides))
    assert len(warnings) == (start is not None)
    assert all(warning.startswith(start) for warning in warnings)
