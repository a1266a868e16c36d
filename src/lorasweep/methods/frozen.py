"""`frozen`: the base model without training, as a baseline for the other methods."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorasweep.methods.method import Method


class FrozenMethod(Method):
    """Trains nothing and saves nothing."""

    name = "frozen"

    def _make_trainable(self, model: nn.Module, config: Any, **_: Any) -> None:
        pass  # a copy of the base is frozen already

    def merge(self, model: nn.Module) -> None:
        """Does nothing, because the model has no trained parameters."""
