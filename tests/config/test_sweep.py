"""No setting of a sweep's driver or arm is out of range."""

from __future__ import annotations

import pytest

from lorasweep.config.compose import compose_driver
from lorasweep.config.sweep import ArmConfig, FixedSampler, ModelBasedSampler, RungPruner, SweepFile
from lorasweep.errors import ConfigError


def make_arm(**values):
    return ArmConfig(**({"name": "lora", "settings": {}, "space": {"method.rank": [1, 2]}, "trials": 3} | values))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler.startup_trials": 0}, "`sampler.startup_trials >= 1` must hold, but got 0."),
        ({"pruner.min_steps": 0}, "`pruner.min_steps >= 1` must hold, but got 0."),
        ({"pruner.reduction_factor": 1}, "`pruner.reduction_factor >= 2` must hold, but got 1."),
        ({"pruner": "median", "pruner.startup_trials": 0}, "`pruner.startup_trials >= 1` must hold, but got 0."),
        ({"pruner": "median", "pruner.min_steps": -1}, "`pruner.min_steps >= 0` must hold, but got -1."),
        ({"sweep.trials": 0}, "`sweep.trials >= 1` must hold, but got 0."),
        ({"sweep.seed": -1}, "`sweep.seed >= 0` must hold, but got -1."),
        ({"confirm.seeds": -1}, "`confirm.seeds >= 0` must hold, but got -1."),
        ({"confirm.seeds": 1001}, "`confirm.seeds <= 1000` must hold, but got 1001."),
        ({"confirm.seeds": "many"}, "`confirm.seeds` must be a whole number, but got 'many'."),
        ({"confirm.seed": 3}, r"`confirm.seed` is not a setting. Did you mean `confirm.seeds`\?"),
        ({"sweep.max_failures": 0}, "`sweep.max_failures >= 1` must hold, but got 0."),
        ({"sampler": "tpee"}, r"`sampler` must be one of .*, but got 'tpee'. Did you mean `tpe`\?"),
        ({"sampler": "random", "sampler.startup_trials": 3}, "`sampler.startup_trials` is not a setting."),
        ({"sweep.trails": 3}, r"`sweep.trails` is not a setting. Did you mean `sweep.trials`\?"),
    ],
)
def test_a_setting_of_the_driver_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compose_driver(settings)


def test_a_sampler_and_a_pruner_are_told_apart_by_name():
    driver = compose_driver({"sampler": "qmc", "pruner": "hyperband"})
    assert driver.sampler == FixedSampler(name="qmc")
    assert driver.pruner == RungPruner(name="hyperband", min_steps=25, reduction_factor=3)
    assert isinstance(compose_driver({}).sampler, ModelBasedSampler)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trials": 0}, "`arms.lora.trials >= 1` must hold, but got 0."),
        ({"trials": 10**7}, "`arms.lora.trials <= 1000000` must hold, but got 10000000."),
        ({"space": {}, "trials": 2}, "`arms.lora.trials` must be 1 for an arm without a space, but got 2. Add a `sp"),
        ({"name": "a/b"}, "an arm's name must consist of letters, digits, `_` and `-`, but got 'a/b'."),
        ({"name": ".."}, "an arm's name must consist of letters, digits, `_` and `-`, but got '..'."),
        ({"name": "a" * 101}, "an arm's name must have at most 100 characters, but got 'aaa"),
        (
            {"name": "lora-confirm"},
            "an arm's name must not end in `-confirm`, which names the runs",
        ),
        ({"name": ""}, "an arm's name must consist of letters, digits, `_` and `-`, but got ''."),
    ],
)
def test_an_arm_out_of_range_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        make_arm(**values)


@pytest.mark.parametrize("name", ["../up", "/root", "a b", "[red]", ""])
def test_a_sweeps_name_that_is_no_folders_name_is_refused(name):
    with pytest.raises(ConfigError, match="`name` must consist of letters, digits, `_` and `-`, but got"):
        SweepFile(name=name, description="", settings={}, arms=(make_arm(),))


@pytest.mark.parametrize("name", ["lora", "lora-r8", "lora_r8", "8"])
def test_plain_names_are_accepted(name):
    assert SweepFile(name=name, description="", settings={}, arms=(make_arm(name=name),)).arms[0].name == name
