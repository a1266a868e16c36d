"""Random streams of a pack, one per slot, and the dropout modules of the base that draw from them.

A slot draws in the order and in the shapes in which its solo run would, so with equal seeds the masks are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SlotStreams:
    """The number of slots of a pack, and each slot's random stream for dropout; all layers of the pack share it.

    Attributes:
        generators: One stream per slot, on the device of the inputs; None draws from torch's own.
        only_slot: The slot that a module is being computed for, where each slot trains its own copy of the module;
            None while layers get the rows of all slots.
        lengths: Length of each slot's rows before they were padded to those of the longest slot; None where all are
            equally long.
    """

    def __init__(self, num_slots: int) -> None:
        self.generators: list[torch.Generator | None] = [None] * num_slots
        self.only_slot: int | None = None
        self.lengths: tuple[int, ...] | None = None

    @property
    def num_slots(self) -> int:
        """Number of slots."""
        return len(self.generators)

    @contextmanager
    def alone(self, slot: int) -> Iterator[None]:
        """Within it, layers get the rows of this slot only."""
        self.only_slot = slot
        try:
            yield
        finally:
            self.only_slot = None

    def drop(self, mask: Tensor, *, rates: Sequence[float]) -> Tensor:
        """Sets elements of a mask of ones to 0, in place, each with the probability of its slot; 0 draws nothing.

        Raises:
            ValueError: It is called in a backward pass, which would draw another mask than the forward pass.
        """
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "Dropout in a pack must be drawn once, but gradient checkpointing draws it again. "
                "Turn `method.dropout` and `model.dropout` or checkpointing off."
            )
        if self.only_slot is not None:
            by_slot = [(self.only_slot, mask)]
        else:
            check_rows(mask, self.num_slots)
            by_slot = list(enumerate(mask.chunk(self.num_slots)))
        for slot, rows in by_slot:
            if rates[slot]:
                own = self._unpadded(slot, rows)
                # a stream fills a tensor in its own order of memory, so it must have the solo run's contiguous shape
                drawn = own if own.is_contiguous() else torch.empty(own.shape, dtype=own.dtype, device=own.device)
                drawn.bernoulli_(1 - rates[slot], generator=self.generators[slot])
                if drawn is not own:
                    own.copy_(drawn)
        return mask

    def _unpadded(self, slot: int, rows: Tensor) -> Tensor:
        """Returns the part of a slot's (rows, length, ...) that its solo run has: without padding for longer slots."""
        if self.lengths is None or rows.dim() < 3 or rows.shape[1] != max(self.lengths):
            return rows
        return rows[:, : self.lengths[slot]]


class SlotDropout(nn.Dropout):
    """An `nn.Dropout` of the base model that draws each slot's mask from the slot's stream.

    The masks are those of `nn.Dropout` in a solo run on a CPU; on other devices torch's fused dropout draws otherwise.

    Attributes:
        base: The module that was replaced.
    """

    def __init__(self, base: nn.Dropout, streams: SlotStreams) -> None:
        super().__init__(base.p)
        self.base = base
        self.streams = streams

    def forward(self, input: Tensor) -> Tensor:
        """Drops elements and scales the others by 1 / (1 - p), as `nn.Dropout` does."""
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
            f"but got shape {tuple(x.shape)}. Stack the slots' batches, and pack no layer that all rows share."
        )
