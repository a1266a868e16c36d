"""A sweep file and the command line become arms. A wrong key or value is refused by name before anything is written."""

import json

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from lorasweep.config.compose import compose_run
from lorasweep.errors import ConfigError
from lorasweep.sweep.definition.arms import read_definition, restore_definition
from lorasweep.sweep.definition.ranges import Range

LR = Range(low=1e-3, high=1e-1, log=True)


def arms_of(definition):
    return {arm.name: arm for arm in definition.arms}


def test_a_file_becomes_arms_in_its_order_whose_corners_are_the_ends_of_their_ranges(read, content):
    definition = read(content)
    assert definition.name == "made_up"
    assert [(arm.name, arm.trials) for arm in definition.arms] == [("frozen", 1), ("full", 3), ("lora", 6)]
    lora = arms_of(definition)["lora"]
    assert lora.space == {"method.rank": Range(choices=[1, 2, 4]), "optim.lr": LR}
    assert arms_of(definition)["frozen"].space == {}
    corners = [(config.method.rank, config.optim.lr) for config in lora.corner_configs]
    assert corners == [(1, 1e-3), (2, 1e-3), (4, 1e-3), (1, 1e-1), (4, 1e-1)]


def test_an_override_reaches_every_arm_that_has_the_key_and_numbers_of_trials_follow(read, content):
    arms = arms_of(read(content, "optim.weight_decay=0.1", "method.alpha=32"))
    assert {name: arm.settings.get("optim.weight_decay") for name, arm in arms.items()} == dict.fromkeys(arms, 0.1)
    assert {name for name, arm in arms.items() if "method.alpha" in arm.settings} == {"lora"}
    full = arms_of(read(content, "arms.full.optim.lr=1e-3"))["full"]  # which leaves nothing to search
    assert (full.space, full.trials, full.compose({}).optim.lr) == ({}, 1, 1e-3)
    content["arms"]["frozen"]["settings"]["optim.lr"] = 0.5  # an arm that searches nothing keeps its value
    assert arms_of(read(content, "optim.lr=0.1,0.2"))["frozen"].compose({}).optim.lr == 0.5
    trials = {arm.name: arm.trials for arm in read(content, "sweep.trials=4", "arms.lora.trials=5").arms}
    assert trials == {"frozen": 1, "full": 2, "lora": 5}  # full searches one key, so it has half of the trials


def test_the_nearest_number_of_trials_wins_and_a_typed_one_over_those_of_the_file(read, content):
    content.setdefault("settings", {})["sweep.trials"] = 6
    content["arms"]["full"]["trials"] = 8
    del content["arms"]["lora"]["trials"]
    assert {arm.name: arm.trials for arm in read(content).arms} == {"frozen": 1, "full": 8, "lora": 6}
    assert {arm.name: arm.trials for arm in read(content, "sweep.trials=4").arms} == {"frozen": 1, "full": 2, "lora": 4}


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("method.rank=1,8", "method.rank", Range(choices=[1, 8])),
        ("method.rank=interval(1,8)", "method.rank", Range(low=1, high=8, is_whole=True)),
        ("optim.lr=tag(log,interval(1e-4,1e-2))", "optim.lr", Range(low=1e-4, high=1e-2, log=True)),
        ("method.alpha=8,16", "method.alpha", Range(choices=[8, 16])),
        ("arms.lora.optim.weight_decay=interval(0,0.1)", "optim.weight_decay", Range(low=0.0, high=0.1)),
        ("method.rank=4", "method.rank", None),
    ],
)
def test_a_typed_range_replaces_or_adds_one_and_a_typed_value_ends_the_search(read, content, override, key, expected):
    content["arms"]["lora"]["settings"]["method.alpha"] = 64  # fixed by the file
    lora = arms_of(read(content, override))["lora"]
    assert lora.space.get(key) == expected
    assert expected or lora.compose({}).method.rank == 4


LAYER = st.fixed_dictionaries(
    {},
    optional={
        "optim.lr": st.floats(1e-5, 1.0),
        "seeds.init": st.integers(0, 9),
        "method.targets": st.sampled_from(["all-linear", ["q_proj"], ["q_proj", "v_proj"]]),
        "schedule": st.sampled_from(["linear", "cosine", "constant"]),
        "schedule.warmup_fraction": st.sampled_from([0.2, 0.3]),
    },
)


@limits(max_examples=20, deadline=None, derandomize=True, database=None)
@given(layers=st.tuples(LAYER, LAYER, LAYER, LAYER))
def test_the_last_layer_that_sets_a_key_wins_unless_a_later_one_chooses_another_option(layers):
    of_file, of_arm, typed, typed_for_arm = layers
    content = {"settings": of_file, "arms": {"a": {"settings": {**of_arm, "method": "lora"}}}}
    words = typed | {f"arms.a.{key}": value for key, value in typed_for_arm.items()}
    expected = {"schedule": "linear"}
    for layer in layers:
        if layer.get("schedule", expected["schedule"]) != expected["schedule"]:
            expected.pop("schedule.warmup_fraction", None)
        expected |= layer
    arm = read_definition(content, words).find_arm("a")
    assert arm.compose({}) == compose_run({**expected, "trainer.progress": False})


@pytest.mark.parametrize(
    ("words", "of_arm"),
    [(["arms.lora.sampler=tpe"], {}), (["arms.lora.sweep.seed=1"], {}), ([], {"worker.pack_size": 2})],
)
def test_the_settings_of_the_sweep_are_set_once(read, content, words, of_arm):
    content["arms"]["lora"]["settings"] |= of_arm
    with pytest.raises(ConfigError, match=r"must be set once for the whole sweep, but arm `lora` sets it"):
        read(content, *words)


def test_a_swept_group_leaves_its_settings_alone(read, content):
    content["settings"]["schedule.warmup_fraction"] = 0.5
    lora = arms_of(read(content, "arms.lora.schedule=choice(linear,cosine)"))["lora"]
    assert lora.space["schedule"] == Range(choices=["linear", "cosine"])
    assert {config.schedule.name for config in lora.corner_configs} == {"linear", "cosine"}
    assert {config.schedule.warmup_fraction for config in lora.corner_configs} == {0.5}


def test_paths_of_files_are_kept_absolute_so_that_a_sweep_goes_on_from_anywhere(read, content, here):
    for name in ("a.txt", "b.txt", "train"):
        (here / name).write_text("some text")
    content["settings"] |= {"data": "text", "data.train": "./a.txt"}
    definition = read(content, "data.validation='*.txt'", "arms.lora.data.test=b.txt")
    assert definition.raw["file"]["settings"]["data.train"] == str(here / "a.txt")
    assert definition.raw["overrides"]["data.validation"] == str(here / "*.txt")
    assert definition.raw["overrides"]["arms.lora.data.test"] == str(here / "b.txt")
    assert read(content, "data.train=train").raw["overrides"]["data.train"] == "train"  # may be a split of the hub


def test_a_definition_comes_back_from_its_record(read, content):
    definition = read(content, "optim.eps=1e-6", "method.rank=choice(1,8)", "sweep.trials=2")
    restored = restore_definition(json.loads(json.dumps(definition.raw)), source=definition.source)
    assert restored == definition


def subjects_of(definition, arm="lora"):
    return [(one.name, one.value) for one in definition.find_arm(arm).subjects]


def test_each_value_of_confirm_each_is_a_subject_and_numbers_ascend(read, content):
    assert subjects_of(read(content)) == [("lora", None)]
    content["arms"]["lora"] |= {"space": {"method.rank": [16, 1, 4], "optim.lr": [0.01]}, "confirm_each": "method.rank"}
    assert subjects_of(read(content)) == [("lora-rank-1", 1), ("lora-rank-4", 4), ("lora-rank-16", 16)]
    content["arms"]["lora"] |= {"space": {"method.targets": ["mlp", "attention"]}, "confirm_each": "method.targets"}
    assert [value for _, value in subjects_of(read(content))] == ["mlp", "attention"]


def test_confirm_each_is_set_on_the_command_line_and_taken_back(read, content):
    definition = read(content, "arms.lora.confirm_each=method.rank")
    assert subjects_of(definition) == [("lora-rank-1", 1), ("lora-rank-2", 2), ("lora-rank-4", 4)]
    assert subjects_of(restore_definition(definition.raw, source=None)) == subjects_of(definition)
    content["arms"]["lora"]["confirm_each"] = "method.rank"
    assert subjects_of(read(content, "arms.lora.confirm_each=null")) == [("lora", None)]
    with pytest.raises(ConfigError, match=r"`method\.rank >= 1` must hold"):  # the first cause, not `confirm_each`
        read(content, "method.rank=0")
    with pytest.raises(ConfigError, match=r"`arms\.lora\.confirm_each` must be a swept key"):
        read(content, "method.rank=4")
