"""How the kept weights of a run are written, whether each rank has them whole or a share of them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lorasweep.methods import Method
from lorasweep.models.load import BaseModel
from lorasweep.training.shard import copy_trained


class WholeModel:
    """Writes what a model trained, as its method does."""

    def __init__(self, model: nn.Module, method: Method, base: BaseModel) -> None:
        """Takes a prepared model, and the base that it is a copy of."""
        self.model = model
        self.method = method
        self.base = base

    def collect(self) -> None:
        """Has nothing to do: it is whole."""

    def save(self, folder: Path) -> None:
        """Writes the kept weights into a folder."""
        self.method.save(self.model, folder, base=self.base)


class ShardedModel(WholeModel):
    """Writes what a sharded model trained: from a whole one, prepared alike, into which it is copied first."""

    def __init__(self, sharded: nn.Module, *, whole: nn.Module | None, method: Method, base: BaseModel) -> None:
        """Takes a whole model on the rank that writes."""
        super().__init__(sharded if whole is None else whole, method, base)
        self.sharded = sharded
        self.whole = whole

    def collect(self) -> None:
        """Copies every rank's share of what trained into the whole model."""
        copy_trained(self.sharded, self.whole)
