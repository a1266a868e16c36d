"""The slots of a pack: their solo models, weights and dropout masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorasweep.lora.dropout import DropoutMasks
from lorasweep.lora.packed.weights import SlotWeights
from lorasweep.lora.targets import Coverage


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """The slots of a pack. All layers of the pack share this object."""

    models: Sequence[nn.Module]
    """The solo model of each slot. It shares the frozen base, and its trained parameters are views of `weights`."""
    weights: SlotWeights
    """What the slots train."""
    masks: DropoutMasks
    """Their dropout masks."""
    coverages: Sequence[Coverage]
    """The layers that each slot adapts."""

    @property
    def num_slots(self) -> int:
        return len(self.models)
