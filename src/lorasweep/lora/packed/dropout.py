"""Dropout in a pack: each slot draws its masks from its own random stream."""

from __future__ import annotations

from torch import Tensor, nn

from lorasweep.lora.packed.slots import Slots


class SlotDropout(nn.Dropout):
    """Dropout that draws each slot's mask from the slot's stream. It replaces an `nn.Dropout` (`base`) of the model.

    The masks equal those of `lora.dropout.Dropout` in a solo run.
    """

    def __init__(self, base: nn.Dropout, slots: Slots) -> None:
        super().__init__(base.p)
        self.base = base
        self.slots = slots

    def forward(self, input: Tensor) -> Tensor:
        return self.slots.drop(input, self.p) if self.training else input
