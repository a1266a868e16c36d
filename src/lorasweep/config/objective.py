"""Settings of the objective: what is learned from the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Tag
from pydantic.dataclasses import dataclass

from lorasweep.config.build import SETTINGS_OR_COMPONENT, ChosenByName, Settings
from lorasweep.config.components import Component


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

    slot_keys: ClassVar[tuple[str, ...]] = ()
    slot_numbers: ClassVar[Mapping[str, float]] = {}

    @property
    def shared(self) -> ObjectiveComponent:
        return self


AnyObjectiveConfig = Annotated[
    Annotated[ObjectiveConfig, ChosenByName("lorasweep.tasks.OBJECTIVES"), Tag("settings")]
    | Annotated[ObjectiveComponent, Tag("component")],
    SETTINGS_OR_COMPONENT,
]
