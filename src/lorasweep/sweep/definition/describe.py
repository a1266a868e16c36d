"""Describes a composed sweep, for `lorasweep sweep NAME --cfg job`."""

from __future__ import annotations

from omegaconf import OmegaConf

from lorasweep.config.build import as_settings
from lorasweep.config.method import ALPHA_OVER_RANK
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.space import describe_space


def describe_definition(definition: Definition) -> str:
    """Returns a sweep as YAML: its own settings, and all settings of each arm's runs.

    A swept key has its range as a value, in the form of a sweep file.
    """
    described = OmegaConf.create({"name": definition.name, **as_settings(definition.sweep_config), "arms": {}})
    for arm in definition.arms:
        settings = OmegaConf.create(as_settings(arm.corner_configs[0]))
        multiplier = {key: value for key, value in arm.settings.items() if key == ALPHA_OVER_RANK}
        for key, value in {**multiplier, **describe_space(arm.space)}.items():
            OmegaConf.update(settings, key, value, merge=False)
        described.arms[arm.name] = {"trials": arm.trials, **settings}
    return OmegaConf.to_yaml(described)
