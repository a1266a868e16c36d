"""Describes a composed sweep, for `lorasweep sweep NAME --cfg job`."""

from __future__ import annotations

from typing import Any

from lorasweep.config.build import as_settings
from lorasweep.sweep.definition.alpha_over_rank import ALPHA, MULTIPLIER, OVER_RANK
from lorasweep.sweep.definition.arms import Arm, Definition
from lorasweep.sweep.definition.space import describe_space


def describe_definition(definition: Definition) -> dict[str, Any]:
    """Returns a sweep as nested mappings: its own settings, and all settings of each arm's runs.

    A swept key has its range as a value, in the form of a sweep file.
    """
    arms = {arm.name: {"trials": arm.trials, **_describe_runs(arm)} for arm in definition.arms}
    return {"name": definition.name, **as_settings(definition.sweep_config), "arms": arms}


def _describe_runs(arm: Arm) -> dict[str, Any]:
    settings: dict[str, Any] = as_settings(arm.corners[0])
    swept = describe_space(arm.space)
    if MULTIPLIER in arm.settings:
        swept[MULTIPLIER] = arm.settings[MULTIPLIER]
    for key, value in swept.items():
        *groups, name = (ALPHA if key == MULTIPLIER else key).split(".")
        inner = settings
        for group in groups:
            inner = inner[group]
        inner[name] = {OVER_RANK: value} if key == MULTIPLIER else value
    return settings
