"""Random streams of a pack, one per slot, and the dropout modules of the base that draw from them.

A slot draws in the order and in the shapes in which its solo run would, so with equal seeds the masks are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SlotStreams:
    """What all layers of one pack share: how many slots there are, and each one's random stream for dropout.

    Attributes:
        generators: One stream per slot, on the device of the inputs; None draws from torch's own.
        only_slot: The slot whose rows are being computed alone (inside a module that each slot trains on a copy of);
            None while the rows of all slots are.
        lengths: How long each slot's rows are before they were padded to those of the longest slot; None where all
            are equally long.
    """

    def __init__(self, num_slots: int) -> None:
        self.generators: list[torch.Generator | None] = [None] * num_slots
        self.only_slot: int | None = None
        self.lengths: tuple[int, ...] | None = None

    @property
    def num_slots(self) -> int:
        """How many slots the pack has."""
        return len(self.generators)

    @contextmanager
    def alone(self, slot: int) -> Iterator[None]:
        """Says that the rows computed inside are those of this slot."""
        self.only_slot = slot
        try:
            yield
        finally:
            self.only_slot = None

    def rows(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """Each slot, and the view of its rows in x."""
        if self.only_slot is not None:
            return [(self.only_slot, x)]
        check_rows(x, self.num_slots)
        return list(enumerate(x.chunk(self.num_slots)))

    def drop(self, mask: Tensor, *, rates: Sequence[float]) -> Tensor:
        """Sets elements of a mask of ones to 0, in place, each with the probability of its slot; 0 draws nothing.

        Raises:
            ValueError: It is drawn in a backward pass, so again and differently.
        """
        _refuse_recomputing()
        for slot, rows in self.rows(mask):
            if rates[slot]:
                own = self._unpadded(slot, rows)
                drawn = own if own.is_contiguous() else torch.empty(own.shape, dtype=own.dtype, device=own.device)
                drawn.bernoulli_(1 - rates[slot], generator=self.generators[slot])
                if drawn is not own:
                    own.copy_(drawn)
        return mask

    def _unpadded(self, slot: int, rows: Tensor) -> Tensor:
        """What the slot's solo run would have of these rows: (rows, length, ...) without padding for longer slots."""
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


def slot_dropouts(model: nn.Module) -> dict[str, SlotDropout]:
    """The dropout modules of a pack, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SlotDropout)}


def check_rows(x: Tensor, num_slots: int) -> None:
    """Refuses an input whose rows can't be shared out evenly.

    Raises:
        ValueError: Its first dimension is not a multiple of the number of slots.
    """
    if x.dim() == 0 or x.shape[0] % num_slots:
        raise ValueError(
            f"The first dimension of a packed input must be a multiple of the {num_slots} slots, "
            f"but got shape {tuple(x.shape)}. Stack the slots' batches, and pack no layer that all rows share."
        )


def _refuse_recomputing() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "Dropout in a pack must be drawn once, but gradient checkpointing draws it again. "
            "Turn `method.dropout` and `model.dropout` or checkpointing off."
        )
