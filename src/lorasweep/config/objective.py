"""Settings of the objective: what is learned from the data."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Tag
from pydantic.dataclasses import dataclass

from lorasweep.config.build import SETTINGS_OR_COMPONENT, ChosenByName, Settings, convert
from lorasweep.config.components import Component, find_class


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings):
    """The objective that belongs to the data. A subclass has the settings of a named objective, with their defaults."""

    slot_keys: ClassVar[tuple[str, ...]] = ()
    """Settings that may differ between the slots of a pack: numbers that the loss reads from the batch, row by row."""

    name: str = "default"

    @property
    def slot_numbers(self) -> dict[str, float]:
        """The values of `slot_keys`."""
        return {key: getattr(self, key) for key in self.slot_keys}

    @property
    def shared(self) -> ObjectiveConfig:
        """The settings that all slots of a pack share, with the defaults of `slot_keys`."""
        return replace(self, **{key: getattr(type(self), key) for key in self.slot_keys})


@dataclass(frozen=True, kw_only=True)
class ObjectiveComponent(Component):
    """An objective of your own by `_target_`, a subclass of `lorasweep.objectives.objective.Objective`."""

    @property
    def slot_keys(self) -> tuple[str, ...]:
        return tuple(self._slot_types)

    @functools.cached_property
    def slot_numbers(self) -> dict[str, float]:
        """The values of `Objective.slot_settings`. Raises ConfigError if one is missing or wrong."""
        given = self.arguments
        return {key: convert(kind, given.get(key), key=f"objective.{key}") for key, kind in self._slot_types.items()}

    @property
    def shared(self) -> ObjectiveComponent:
        """The settings that all slots of a pack share."""
        return replace(self, arguments={key: x for key, x in self.arguments.items() if key not in self.slot_keys})

    @property
    def _slot_types(self) -> Mapping[str, Any]:
        found: Any = find_class(self.target, key="objective", expected=object)
        types: Mapping[str, Any] = getattr(found, "slot_settings", {})
        return types


AnyObjectiveConfig = Annotated[
    Annotated[ObjectiveConfig, ChosenByName("lorasweep.tasks.OBJECTIVES"), Tag("settings")]
    | Annotated[ObjectiveComponent, Tag("component")],
    SETTINGS_OR_COMPONENT,
]
