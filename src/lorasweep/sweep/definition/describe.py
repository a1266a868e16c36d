"""Describes a composed sweep, for `lorasweep sweep NAME --cfg job`."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.build import as_settings
from lorasweep.config.method import ALPHA_OVER_RANK
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.space import describe_space


def describe_definition(definition: Definition) -> dict[str, Any]:
    """Returns a sweep as nested mappings: its own settings, and all settings of each arm's runs.

    A swept key has its range as a value, in the form of a sweep file.
    """
    arms = {arm.name: {"trials": arm.trials, **_describe_runs(arm)} for arm in definition.arms}
    return {"name": definition.name, **as_settings(definition.sweep_config), "arms": arms}


def _describe_runs(arm: Arm) -> Any:
    settings = OmegaConf.create(as_settings(arm.corners[0]))
    multiplier = {key: value for key, value in arm.settings.items() if key == ALPHA_OVER_RANK}
    for key, value in {**multiplier, **describe_space(arm.space)}.items():
        OmegaConf.update(settings, key, value, merge=False)
    return OmegaConf.to_container(settings)
