"""A typed override is a value or a range, by the declared type of its setting, or else by its form."""

import pytest

from lorasweep.config.command_line import parse_overrides
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.overrides import Overrides
from lorasweep.sweep.definition.ranges import Range


def parse(override):
    (parsed,) = Overrides.parse(parse_overrides([override])).common.values()
    return parsed


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("method.targets=[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("module.new_modules=[head]", ["head"]),
        ("logger=[csv,tensorboard]", ["csv", "tensorboard"]),
        ("method.rank_pattern={low: 1, high: 2}", {"low": 1, "high": 2}),  # names of layers
        ("data.template_arguments={high: 2}", {"high": 2}),
        ("trainer.strategy={_target_: a.B, low: 1}", {"_target_": "a.B", "low": 1}),
        ("confirm.seeds=[3,6]", [3, 6]),
    ],
)
def test_a_list_or_mapping_for_a_setting_that_holds_one_is_its_value(override, value):
    assert parse(override) == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method.rank=1,4", Range(choices=[1, 4])),
        ("schedule=linear,cosine", Range(choices=["linear", "cosine"])),
        ("method.rank=interval(1,8)", Range(low=1, high=8, is_whole=True)),
        ("trainer.early_stop_evaluations=interval(2,4)", Range(low=2, high=4, is_whole=True)),  # an int or null
        ("optim.lr={low: 1, high: 2}", Range(low=1.0, high=2.0)),
        ("callbacks.mine.names=[a,b]", Range(choices=["a", "b"])),
        ("callbacks.mine.patience=range(1,4)", Range(low=1, high=3, is_whole=True)),
        ("optim.momentum=interval(0,1)", Range(low=0.0, high=1.0)),
    ],
)
def test_a_list_or_bounds_for_another_setting_are_searched(override, expected):
    assert parse(override) == expected


def test_an_override_is_for_all_arms_or_for_the_arm_that_it_names():
    words = ["optim.lr=0.1", "arms.lora.optim.lr=1,2", "arms.lora.trials=3", "arms.full=null", "arms.lora.seed=2"]
    overrides = Overrides.parse(parse_overrides(words))
    assert overrides.common == {"optim.lr": 0.1}
    assert overrides.own == {"lora": {"optim.lr": Range(choices=[1, 2]), "seed": 2}}
    assert (overrides.fields, overrides.left_out) == ({"lora": {"trials": 3}}, {"full"})


def test_no_arm_is_left_out_if_it_is_the_last(read, content):
    with pytest.raises(ConfigError, match="at least one arm"):
        read(content, *(f"arms.{name}=null" for name in content["arms"]))


def test_further_overrides_win_and_drop_those_below_their_keys(read, content):
    before = read(content, "worker=ray", "worker.num=2", "optim.lr=0.1", "arms.lora.trials=5")
    after = before.with_overrides({"worker": "local", "optim.lr": [0.1, 0.2]})
    assert after.raw["overrides"] == {"worker": "local", "optim.lr": [0.1, 0.2], "arms.lora.trials": 5}
    assert after == read(content, "worker=local", "optim.lr=0.1,0.2", "arms.lora.trials=5")
    assert before.raw["overrides"]["worker"] == "ray"
