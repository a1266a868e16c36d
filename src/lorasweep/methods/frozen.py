"""`frozen`: the base model as it is, the row that every gain is measured from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lorasweep.config.method import MethodConfig
from lorasweep.methods.head_init import draw_head
from lorasweep.methods.method import ParameterGroup
from lorasweep.models.load import BaseModel


class FrozenMethod:
    """Nothing trains and nothing is saved."""

    name = "frozen"
    needs_autocast = False

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Fits every model."""

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Draws a new head and changes nothing else: a copy of the base is frozen already."""
        draw_head(model, head, generator=generator)

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns no group."""
        return []

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes nothing."""

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads nothing."""

    def merge(self, model: nn.Module) -> None:
        """Changes nothing: it is a plain model."""
