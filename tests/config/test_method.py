"""The settings of methods: one default for Hydra and for Python, and no value out of range."""

import math

import pytest

from lorasweep.config.build import build
from lorasweep.config.compose import compose_run
from lorasweep.config.method import BitfitConfig, IntrinsicConfig, LoraConfig
from lorasweep.errors import ConfigError


@pytest.mark.parametrize("config", [LoraConfig(), BitfitConfig(), IntrinsicConfig()], ids=lambda config: config.name)
def test_defaults_in_python_are_those_of_conf(config):
    assert compose_run({"method": config.name}).method == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_proj": 0}}, "`method.rank_pattern.q_proj >= 1` must hold, but got 0"),
        ({"alpha": math.inf}, "`method.alpha` must be a finite number, but got inf"),
        ({"dropout": 1.0}, "`method.dropout < 1` must hold, but got 1.0"),
        ({"targets": ""}, "`method.targets` .* Use `all-linear`"),
        ({"init": "orthogonal", "rank": 3}, "`method.rank` must be even with `method.init=orthogonal`, but got 3"),
        ({"init": "pissa", "alpha": 0.0}, "`method.alpha > 0` must hold with `method.init=pissa`, but got 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(LoraConfig, settings, key="method")
    with pytest.raises(ValueError, match=next(iter(settings))):
        LoraConfig(**settings)


def test_settings_can_be_keys_although_they_hold_mappings():
    config = LoraConfig(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1.0})
    assert {config: 1}[LoraConfig(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1.0})] == 1
