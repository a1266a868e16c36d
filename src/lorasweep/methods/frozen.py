"""`frozen`: the base model without training, the baseline from which the gains of other methods are measured."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lorasweep.config.method import MethodConfig
from lorasweep.methods.head_init import draw_head
from lorasweep.methods.method import ParameterGroup
from lorasweep.models.load import BaseModel


class FrozenMethod:
    """Trains nothing and saves nothing."""

    name = "frozen"
    needs_autocast = False

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Does nothing: the method fits every model."""

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Draws a new head and changes nothing else, because a copy of the base is frozen already."""
        draw_head(model, head, generator=generator)

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns an empty list, because no parameter trains."""
        return []

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes nothing."""

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads nothing."""

    def merge(self, model: nn.Module) -> None:
        """Does nothing: the model is a plain one already."""
