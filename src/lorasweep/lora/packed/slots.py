"""The slots of a pack: their solo models, and the random streams of their dropout masks.

A slot draws masks in the same order and shapes as its solo run. With equal seeds, the masks are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Slots:
    """The slots of a pack. All layers of the pack share this object.

    Attributes:
        models: The solo model of each slot. It shares the frozen base, and its trainable parameters are the pack's.
        generators: Dropout stream of each slot, on the device of the inputs; None draws from torch's default stream.
        only_slot: The one slot whose rows the layers get, while a module is computed slot by slot; otherwise None.
        sequence_lengths: Length of each slot's sequences before padding to the longest slot; None if no slot is padded.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        self.generators: list[torch.Generator | None] = [None] * len(models)
        self.only_slot: int | None = None
        self.sequence_lengths: tuple[int, ...] | None = None

    @property
    def num_slots(self) -> int:
        return len(self.models)

    @contextmanager
    def compute_only_slot(self, slot: int) -> Iterator[None]:
        """Draws masks for this slot only, inside the block. The caller must pass only the rows of this slot."""
        self.only_slot = slot
        try:
            yield
        finally:
            self.only_slot = None

    def draw_keep_mask(self, mask: Tensor, *, rates: Sequence[float]) -> Tensor:
        """Sets random elements of a mask of ones to 0, in place, and returns the mask.

        Args:
            mask: Ones, with the rows of all slots (slot-major), or of `only_slot`.
            rates: Probability of a 0 for each slot. A slot with rate 0 draws no random numbers.

        Raises:
            ValueError: A backward pass is running. It would draw another mask than the forward pass.
        """
        if torch._C._current_graph_task_id() != -1:  # -1: no backward pass is running
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
                unpadded = self._strip_padding(slot, rows)
                # The order in memory decides which element gets which random number. So draw into a contiguous tensor,
                # as the solo run does.
                drawn = unpadded.contiguous()  # `unpadded` itself if it is contiguous
                drawn.bernoulli_(1 - rates[slot], generator=self.generators[slot])
                if drawn is not unpadded:
                    unpadded.copy_(drawn)
        return mask

    def _strip_padding(self, slot: int, rows: Tensor) -> Tensor:
        """Returns a view of a slot's (rows, length, ...) without the padding, which its solo run does not have."""
        if self.sequence_lengths is None or rows.dim() < 3 or rows.shape[1] != max(self.sequence_lengths):
            return rows
        return rows[:, : self.sequence_lengths[slot]]


def check_rows(x: Tensor, num_slots: int) -> None:
    """Raises a ValueError if the number of rows of an input is not a multiple of the number of slots."""
    if x.dim() == 0 or x.shape[0] % num_slots:
        raise ValueError(
            f"The first dimension of a packed input must be a multiple of the {num_slots} slots, "
            f"but got shape {tuple(x.shape)}. Concatenate batches of equal size, one per slot."
        )
