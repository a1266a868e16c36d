"""Objectives: what is learned from examples. Each has its loss, its metrics and its values by example in one class."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorasweep.config.build import convert
from lorasweep.config.components import find_class
from lorasweep.config.run import ObjectiveConfig
from lorasweep.data.source import DataKind
from lorasweep.objectives.labels import Classification, Regression
from lorasweep.objectives.next_tokens import NextTokens
from lorasweep.objectives.objective import Objective

OBJECTIVES: Mapping[DataKind, type[Objective]] = {
    "documents": NextTokens,
    "conversations": NextTokens,
    "single_label": Classification,
    "regression": Regression,
}
"""The objective of each kind of data, unless `objective._target_` names another one."""


def list_slot_settings(config: ObjectiveConfig) -> dict[str, Any]:
    """Returns the settings of an objective that may differ between the slots of a pack, with their types."""
    if not config.arguments:
        return {}
    if config.target is None:
        classes = list(OBJECTIVES.values())
    else:
        classes = [find_class(config.target, key="objective", expected=Objective)]  # type: ignore[type-abstract]
    return {name: kind for each in classes for name, kind in each.slot_settings.items()}


def read_slot_settings(config: ObjectiveConfig) -> dict[str, float]:
    """Returns the values of `list_slot_settings` in a run. Raises ConfigError if one is missing or wrong."""
    return {
        name: convert(kind, config.arguments.get(name), key=f"objective.{name}")
        for name, kind in list_slot_settings(config).items()
    }


def drop_slot_settings(config: ObjectiveConfig) -> ObjectiveConfig:
    """Returns the settings that all slots of a pack share."""
    dropped = list_slot_settings(config)
    return replace(config, arguments={name: x for name, x in config.arguments.items() if name not in dropped})
