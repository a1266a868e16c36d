"""The settings of methods: one default for Hydra and for Python, and no value out of range."""

from __future__ import annotations

import math

import pytest

from lorasweep.config.compose import compose_run
from lorasweep.config.method import BitfitConfig, IntrinsicConfig, LoraConfig
from lorasweep.errors import ConfigError


@pytest.mark.parametrize("config", [LoraConfig(), BitfitConfig(), IntrinsicConfig()], ids=lambda config: config.name)
def test_defaults_in_python_are_those_of_conf(config):
    assert compose_run({"method": config.name}).method == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`method.rank >= 1` must hold, but got 0. Use `method=frozen` to train nothing."),
        ({"rank": -3}, "`method.rank >= 1` must hold, but got -3."),
        ({"rank": True}, "`method.rank >= 1` must hold, but got True."),
        ({"rank": 2.0}, "`method.rank >= 1` must hold, but got 2.0."),
        ({"rank_pattern": {"q_proj": 0}}, "`method.rank >= 1` must hold, but got 0."),
        ({"alpha": -1.0}, "`method.alpha` must be a finite number >= 0, but got -1.0."),
        ({"alpha": math.nan}, "`method.alpha` must be a finite number >= 0, but got nan."),
        ({"alpha": math.inf}, "`method.alpha` must be a finite number >= 0, but got inf."),
        ({"alpha_pattern": {"q_proj": -1.0}}, "`method.alpha` must be a finite number >= 0, but got -1.0."),
        ({"dropout": 1.0}, "`0 <= method.dropout < 1` must hold, but got 1.0."),
        ({"dropout": -0.1}, "`0 <= method.dropout < 1` must hold, but got -0.1."),
        ({"dropout": math.nan}, "`0 <= method.dropout < 1` must hold, but got nan."),
        ({"targets": ()}, "`method.targets` must name at least one layer, but got none. Use `all-linear`."),
        ({"targets": ""}, "`method.targets` must name at least one layer, but got none."),
        ({"scaling": "alpha"}, "`method.scaling` must be one of .*, but got 'alpha'."),
        ({"init": "zero"}, "`method.init` must be one of .*, but got 'zero'."),
        ({"variant": "x"}, "`method.variant` must be one of .*, but got 'x'."),
        ({"bias": "some"}, "`method.bias` must be one of .*, but got 'some'."),
        ({"layers": (-1,)}, "`method.layers` must be indices >= 0, but got -1."),
        ({"layers": (True,)}, "`method.layers` must be indices >= 0, but got True."),
        ({"init": "orthogonal", "rank": 3}, "`method.rank` must be even with `method.init=orthogonal`, but got 3."),
        ({"init": "pissa", "alpha": 0.0}, "`method.alpha > 0` must hold with `method.init=pissa`, but got 0."),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


def test_an_alpha_of_zero_is_the_base_model():
    assert LoraConfig(alpha=0.0).alpha == 0.0


def test_settings_can_be_keys_although_they_hold_mappings():
    config = LoraConfig(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1.0})
    assert {config: 1}[LoraConfig(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1.0})] == 1


@pytest.mark.parametrize("dim", [0, -1, True, 2.0])
def test_a_dimension_out_of_range_is_refused(dim):
    with pytest.raises(ConfigError, match=f"`method.dim >= 1` must hold, but got {dim}. Use `method=frozen` to train"):
        IntrinsicConfig(dim=dim)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "bitfit", "method.train": "weights"}, "`method.train` must be one of biases, biases_and_norms"),
        (
            {"method": "intrinsic", "method.form": "sid"},
            "`method.form` must be one of did, said, but got 'sid'. Did you",
        ),
    ],
)
def test_a_choice_that_there_is_not_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compose_run(settings)
