"""`expand` makes one arm per value, each with its own search and the same budget."""

from __future__ import annotations

import pytest

from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition

RATES = {"low": 1e-3, "high": 1e-1, "log": True}


@pytest.fixture
def expanded(content):
    """A sweep whose LoRA arm is expanded over the rank."""
    content["arms"]["lora"] = {
        "settings": {"method": "lora"},
        "expand": {"method.rank": [1, 4, 16]},
        "space": {"optim.lr": RATES},
        "trials": 6,
    }
    return content


@pytest.fixture
def read(write_file):
    """Reads a sweep file's content with overrides; returns the arms by name."""
    return lambda content, *overrides: {arm.name: arm for arm in read_definition(write_file(content), overrides).arms}


def test_each_value_is_an_arm_with_the_same_search_and_budget(read, expanded):
    arms = read(expanded)
    assert list(arms) == ["frozen", "full", "lora-rank1", "lora-rank4", "lora-rank16"]
    ranks = [arm for arm in arms.values() if arm.expanded_from == "lora"]
    assert [arm.compose({"optim.lr": 0.01}).method.rank for arm in ranks] == [1, 4, 16]
    assert {arm.trials for arm in ranks} == {6}
    assert len({str(arm.space) for arm in ranks}) == 1
    assert [arm.expanded for arm in ranks] == [{"method.rank": rank} for rank in (1, 4, 16)]
    assert arms["full"].expanded_from is None


def test_several_keys_give_every_combination(read, expanded):
    expanded["arms"]["lora"]["expand"] = {"method.rank": [1, 4], "method.dropout": [0, 0.1]}
    arms = [arm for arm in read(expanded).values() if arm.expanded_from]
    assert [arm.name for arm in arms] == [
        "lora-rank1-dropout0",
        "lora-rank1-dropout0_1",
        "lora-rank4-dropout0",
        "lora-rank4-dropout0_1",
    ]
    composed = [arm.compose({}).method for arm in arms]
    assert [(method.rank, method.dropout) for method in composed] == [(1, 0), (1, 0.1), (4, 0), (4, 0.1)]


@pytest.mark.parametrize(
    ("key", "values", "names", "check"),
    [
        ("method.variant", ["lora", "dora"], ["variant_lora", "variant_dora"], lambda c: c.method.variant),
        ("optim.lr", [0.001, 1e-5], ["lr0_001", "lr1e-05"], lambda c: c.optim.lr),
        (
            "method.targets",
            [["q_proj", "v_proj"], "all-linear"],
            ["targets_q_proj_v_proj", "targets_all-linear"],
            lambda c: c.method.targets,
        ),
        ("schedule", ["linear", "cosine"], ["schedule_linear", "schedule_cosine"], lambda c: c.schedule.name),
    ],
)
def test_any_setting_can_be_expanded_over(read, expanded, key, values, names, check):
    expanded["arms"]["lora"] |= {"expand": {key: values}, "space": {}, "trials": 1}
    arms = [arm for arm in read(expanded).values() if arm.expanded_from]
    assert [arm.name for arm in arms] == [f"lora-{name}" for name in names]
    got = [check(arm.compose({})) for arm in arms]
    assert [list(value) if isinstance(value, tuple) else value for value in got] == values


def test_samplers_can_be_compared(read, expanded):
    expanded["arms"]["lora"]["expand"] = {"sampler": ["tpe", "random"]}
    arms = read(expanded)
    assert arms["lora-sampler_tpe"].sweep_config.sampler.name == "tpe"
    assert arms["lora-sampler_random"].sweep_config.sampler.name == "random"


def test_multipliers_of_alpha_can_be_compared_with_a_fixed_alpha(read, expanded):
    expanded["arms"]["lora"]["expand"] = {"method.rank": [2, 4], "method.alpha": [16, {"over_rank": 0.5}]}
    arms = {name: arm for name, arm in read(expanded).items() if arm.expanded_from}
    assert {name: arm.compose({}).method.alpha for name, arm in arms.items()} == {
        "lora-rank2-alpha16": 16,
        "lora-rank2-alpha_over_rank0_5": 1,
        "lora-rank4-alpha16": 16,
        "lora-rank4-alpha_over_rank0_5": 2,
    }


def test_a_list_of_multipliers_is_expanded_over(read, expanded):
    expanded["arms"]["lora"]["expand"] = {"method.alpha": {"over_rank": [1, 2]}}
    expanded["arms"]["lora"]["settings"]["method.rank"] = 4
    arms = read(expanded)
    assert arms["lora-alpha_over_rank1"].compose({}).method.alpha == 4
    assert arms["lora-alpha_over_rank2"].compose({}).method.alpha == 8


def test_an_override_of_the_written_arm_reaches_all_and_of_one_arm_that_one(read, expanded):
    arms = read(expanded, "arms.lora-rank4.trials=9", "arms.lora.trials=2", "arms.lora.optim.eps=1e-6")
    assert {name: arm.trials for name, arm in arms.items() if arm.expanded_from} == {
        "lora-rank1": 2,
        "lora-rank4": 9,
        "lora-rank16": 2,
    }
    assert {name for name, arm in arms.items() if arm.settings.get("optim.eps") == 1e-6} == {
        "lora-rank1",
        "lora-rank4",
        "lora-rank16",
    }


def test_the_command_line_may_expand_over_other_values_or_expand_an_arm(read, expanded):
    assert "lora-rank8" in read(expanded, "arms.lora.expand.method.rank=[2,8]")
    assert "lora-rank8" in read(expanded, "arms.lora.expand.method.rank=2,8")
    arms = read(expanded, "arms.full.expand.optim.weight_decay=[0,0.1]")
    assert {name for name, arm in arms.items() if arm.expanded_from == "full"} == {
        "full-weight_decay0",
        "full-weight_decay0_1",
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method.rank": []}, r"`arms.lora.expand.method.rank` must be a list with at least one value, but got \[\]."),
        ({"method.rank": 4}, "`arms.lora.expand.method.rank` must be a list with at least one value, but got 4."),
        ({"method.rank": {"low": 1, "high": 4}}, "`arms.lora.expand.method.rank` must be a list with at least one"),
        ({"method.rnk": [1, 2]}, "`method.rnk` is not a setting. Did you mean `method.rank`"),
        ({"method.rank": [1, 0]}, "arm `lora-rank0`: `method.rank >= 1` must hold, but got 0."),
        ({"method.rank": ["a"]}, "arm `lora-rank_a`: `method.rank` must be a whole number, but got 'a'."),
        ({"method.rank": [1, 1]}, "arms must have different names, but two are called 'lora-rank1'. Rename one."),
        ({"optim.lr": [0.1]}, "`optim.lr` must be in `expand` or in `space` of arm `lora`, but is in both."),
        ({"confirm.seeds": [1, 2]}, "`confirm.seeds` must be the same for all arms"),
        ([1, 2], "`arms.lora.expand` must be a mapping"),
    ],
)
def test_an_expansion_that_is_wrong_is_refused(read, expanded, values, message):
    expanded["arms"]["lora"]["expand"] = values
    with pytest.raises(ConfigError, match=message):
        read(expanded)


def test_an_arm_that_is_called_as_an_expanded_one_is_refused(read, expanded):
    expanded["arms"]["lora-rank4"] = {"settings": {"method": "lora"}}
    with pytest.raises(ConfigError, match=r"arms must have different names, but two are called 'lora-rank4'\."):
        read(expanded)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank=8", "`method.rank` must not be set, because arm `lora` is expanded over it."),
        ("method.rank=choice(2,8)", "`method.rank` must not be set, because arm `lora` is expanded over it."),
        (
            "arms.lora.method.rank=8",
            r"`arms.lora.method.rank` must not be set.* `arms.lora.expand.method.rank=\[",
        ),
        ("arms.lora-rank4.method.rank=8", "`arms.lora-rank4.method.rank` must not be set"),
        ("arms.lora-rank5.trials=8", "`arms.lora-rank5.trials` must be a setting of at least one arm"),
        (
            "arms.lora-rank4.expand.optim.eps=[1]",
            "`arms.lora-rank4.expand.optim.eps` must be a setting of",
        ),
    ],
)
def test_an_override_that_does_not_fit_an_expansion_is_refused(read, expanded, override, message):
    with pytest.raises(ConfigError, match=message):
        read(expanded, override)


def test_the_record_says_what_an_arm_was_expanded_from(begin, expanded):
    folder = begin(expanded)
    folder.close()
    rows = {row.name: row for row in folder.record.arms}
    assert (rows["lora-rank4"].expanded_from, rows["lora-rank4"].expanded) == ("lora", {"method.rank": 4})
    assert (rows["full"].expanded_from, rows["full"].expanded) == (None, {})


def test_an_expansion_without_end_is_refused_before_its_arms_are_made(read, expanded):
    keys = (
        "method.rank",
        "method.alpha",
        "optim.lr",
        "seed",
        "optim.weight_decay",
        "method.dropout",
        "trainer.batch_size",
    )
    expanded["arms"]["lora"]["expand"] = {key: [*range(1, 101)] for key in keys}
    del expanded["arms"]["lora"]["space"]
    with pytest.raises(ConfigError, match="must create at most 1,000 arms, but has 100,000,000,000,000 combinations"):
        read(expanded)
