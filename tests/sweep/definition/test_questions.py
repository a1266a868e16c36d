"""A sweep states its questions before it starts: what is compared with what follows from its arms alone."""

from __future__ import annotations

import pytest

from lorasweep.errors import ConfigError
from lorasweep.record import read_sweep
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.questions import list_questions

RANKS = ["lora-rank-1", "lora-rank-2", "lora-rank-4"]
OTHER = {"settings": {"method": "lora", "method.rank": 2}, "space": {"optim.lr": [0.01, 0.02]}, "trials": 2}


@pytest.fixture
def ask(write_file):
    """Returns each question's name, subjects and reference."""

    def of(content, *overrides):
        questions = list_questions(read_definition(write_file(content), overrides))
        return [(question.name, question.subjects, question.reference) for question in questions]

    return of


def test_each_arm_that_trains_is_compared_with_full(ask, content):
    content["arms"]["other"] = OTHER
    assert ask(content) == [("as_good_as_full", ["lora"], "full"), ("as_good_as_full", ["other"], "full")]


def test_values_are_compared_with_full_and_the_smallest_rank_is_asked_for(ask, content):
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    assert ask(content) == [("as_good_as_full", RANKS, "full"), ("smallest", RANKS, None)]


def test_the_smallest_value_is_asked_for_only_where_a_smaller_one_costs_less(ask, content):
    content["arms"]["lora"] |= {"space": {"method.alpha": [8, 16]}, "confirm_each": "method.alpha"}
    assert [name for name, _, _ in ask(content)] == ["as_good_as_full"]


def test_without_full_other_arms_are_compared_with_the_first_that_trains(ask, content):
    content["arms"].pop("full")
    assert ask(content) == []
    content["arms"]["other"] = OTHER
    assert ask(content) == [("pair", ["other"], "lora")]
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    assert ask(content) == [("pair", ["other"], "lora-rank-4"), ("smallest", RANKS, None)]


def test_pairs_are_asked_for_beside_full_and_in_place_of_the_first_arm(ask, content):
    content["arms"]["other"] = OTHER
    pair = "confirm.pairs=[[other,lora]]"
    assert ask(content, pair)[-1] == ("pair", ["other"], "lora")
    assert len(ask(content, pair)) == 3
    content["arms"].pop("full")
    assert ask(content, pair) == [("pair", ["other"], "lora")]


def test_a_pair_may_name_one_value_or_all_of_an_arm(ask, content):
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    content["arms"]["other"] = OTHER
    content["arms"].pop("full")
    pairs = "confirm.pairs=[[lora-rank-1,other],[lora,other],[other,lora],[other,lora-rank-2]]"
    assert ask(content, pairs)[1:] == [
        ("pair", ["lora-rank-1"], "other"),
        ("pair", RANKS, "other"),
        ("pair", ["other"], "lora-rank-4"),
        ("pair", ["other"], "lora-rank-2"),
    ]


def test_a_pair_with_an_unknown_arm_is_refused_with_the_nearest(ask, content):
    with pytest.raises(ConfigError, match=r"confirm\.pairs.*'loar'.*`lora`"):
        ask(content, "confirm.pairs=[[loar,full]]")


def test_questions_and_looks_are_in_the_record_before_the_first_trial(begin, content):
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    folder = begin(content, "confirm.seeds=auto", "confirm.looks=[2,4]")
    folder.close()
    record = read_sweep(folder.path)
    assert [question.name for question in record.questions] == ["as_good_as_full", "smallest"]
    assert (record.looks, len(record.confirm_seeds), record.trials) == ([2, 4], 4, [])
    assert {arm.name: arm.confirm_each for arm in record.arms} == {"frozen": None, "full": None, "lora": "method.rank"}
