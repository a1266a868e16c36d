"""Random streams of a pack, one per slot, and the dropout modules of the base that draw from them.

A slot draws in the order and in the shapes of its solo run, so that with equal seeds the masks are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SlotStreams:
    """The number of slots of a pack, and each slot's random stream for dropout; all layers share one such object.

    Attributes:
        generators: One stream per slot, on the device of the inputs; None draws from torch's own stream.
        only_slot: The slot whose rows layers get now, while a module is computed slot by slot; None if layers get the
            rows of all slots.
        lengths: Length of each slot's rows before padding to the longest slot; None if no slot is padded.
    """

    def __init__(self, num_slots: int) -> None:
        self.generators: list[torch.Generator | None] = [None] * num_slots
        self.only_slot: int | None = None
        self.lengths: tuple[int, ...] | None = None

    @property
    def num_slots(self) -> int:
        return len(self.generators)

    @contextmanager
    def alone(self, slot: int) -> Iterator[None]:
        """Tells layers that they get the rows of this slot only, while the context is open."""
        self.only_slot = slot
        try:
            yield
        finally:
            self.only_slot = None

    def drop(self, mask: Tensor, *, rates: Sequence[float]) -> Tensor:
        """Sets elements of a mask of ones to 0, in place, each with its slot's probability. A rate of 0 draws nothing.

        Raises:
            ValueError: This is a backward pass, which would draw another mask than the forward pass.
        """
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "Dropout in a pack must be drawn once, but activation checkpointing draws it again. "
                "Set `method.dropout` and `model.dropout` to 0, or `trainer.activation_checkpointing` to false."
            )
        if self.only_slot is not None:
            by_slot = [(self.only_slot, mask)]
        else:
            check_rows(mask, self.num_slots)
            by_slot = list(enumerate(mask.chunk(self.num_slots)))
        for slot, rows in by_slot:
            if rates[slot]:
                unpadded = self._unpadded(slot, rows)
                # drawn in a contiguous tensor, as in the solo run: the order in memory decides which element gets which
                # random number
                drawn = unpadded.contiguous()  # `unpadded` itself if it is contiguous
                drawn.bernoulli_(1 - rates[slot], generator=self.generators[slot])
                if drawn is not unpadded:
                    unpadded.copy_(drawn)
        return mask

    def _unpadded(self, slot: int, rows: Tensor) -> Tensor:
        """Returns a slot's (rows, length, ...) without the padding, which its solo run does not have."""
        if self.lengths is None or rows.dim() < 3 or rows.shape[1] != max(self.lengths):
            return rows
        return rows[:, : self.lengths[slot]]


class SlotDropout(nn.Dropout):
    """Replaces an `nn.Dropout` of the base model (`base`) and draws each slot's mask from the slot's stream.

    On a CPU the masks equal those of `nn.Dropout` in a solo run; on other devices torch's fused dropout differs.
    """

    def __init__(self, base: nn.Dropout, streams: SlotStreams) -> None:
        super().__init__(base.p)
        self.base = base
        self.streams = streams

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        if self.p == 1:
            return input * 0
        noise = self.streams.drop(torch.ones_like(input), rates=[self.p] * self.streams.num_slots)
        return input * noise.div_(1 - self.p)


def check_rows(x: Tensor, num_slots: int) -> None:
    """Raises a ValueError unless the first dimension of an input is a multiple of the number of slots."""
    if x.dim() == 0 or x.shape[0] % num_slots:
        raise ValueError(
            f"The first dimension of a packed input must be a multiple of the {num_slots} slots, "
            f"but got shape {tuple(x.shape)}. Concatenate batches of equal size, one per slot."
        )
