"""Dropout in a pack: each slot draws its masks from its own random stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorasweep.lora.packed.slots import Slots


class SlotDropout(nn.Dropout):
    """Dropout that draws each slot's mask from the slot's stream. It replaces an `nn.Dropout` (`base`) of the model.

    On a CPU, the masks equal those of `nn.Dropout` in a solo run. On other devices, torch's fused dropout draws
    different masks.
    """

    def __init__(self, base: nn.Dropout, slots: Slots) -> None:
        super().__init__(base.p)
        self.base = base
        self.slots = slots

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        if self.p == 1:
            return input * 0
        noise = self.slots.draw_keep_mask(torch.ones_like(input), rates=[self.p] * self.slots.num_slots)
        return input * noise.div_(1 - self.p)
