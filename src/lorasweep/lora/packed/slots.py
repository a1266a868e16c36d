"""The slots of a pack: their solo models, and the random streams of their dropout masks.

A slot draws masks in the same order and shapes as its solo run. With equal seeds, the masks are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lorasweep.lora.dropout import draw_keep_mask, drop, drop_from_default_stream
from lorasweep.lora.packed.stacks import StepStacks


class Slots:
    """The slots of a pack. All layers of the pack share this object.

    Attributes:
        models: The solo model of each slot. It shares the frozen base, and its trainable parameters are the pack's.
        generators: Dropout stream of each slot, on the device of the inputs; None draws from torch's default stream.
        only_slot: The one slot whose rows the layers get, while a module is computed slot by slot; otherwise None.
        stacks: The stacked matrices of all layers. Layers use them inside `stacks.share()`.
        sequence_lengths: Length of each slot's sequences before padding to the longest slot; None if no slot is padded.
        is_drawing_again: Whether activation checkpointing computes a part of the model again with the same masks.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        self.generators: list[torch.Generator | None] = [None] * len(models)
        self.only_slot: int | None = None
        self.stacks = StepStacks()
        self.sequence_lengths: tuple[int, ...] | None = None
        self.is_drawing_again = False

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

    def save_streams(self) -> AbstractContextManager[None]:
        """Returns a context in which the slots draw the same masks again as after this call. It can be entered once.

        Activation checkpointing must compute a part of the model again in the context that was saved before the part:
        `checkpoint(part, x, use_reentrant=False, context_fn=lambda: (nullcontext(), slots.save_streams()))`.
        """
        return self._draw_again([stream and stream.clone_state() for stream in self.generators], self.sequence_lengths)

    @contextmanager
    def _draw_again(self, streams: list[torch.Generator | None], lengths: tuple[int, ...] | None) -> Iterator[None]:
        # The streams themselves stay where the forward pass left them. torch restores its default stream.
        before = self.generators, self.sequence_lengths, self.is_drawing_again
        self.generators, self.sequence_lengths, self.is_drawing_again = streams, lengths, True
        try:
            yield
        finally:
            self.generators, self.sequence_lengths, self.is_drawing_again = before

    def drop(self, x: Tensor, rate: float) -> Tensor:
        """Returns x after dropout, with masks from the streams of the slots.

        A tensor that has no rows for each slot, such as a bias that all rows share, draws from torch's default stream.
        """
        if self.only_slot is None and (x.dim() == 0 or len(x) % self.num_slots):
            return drop_from_default_stream(x, rate)
        return x if rate == 0 else drop(x, self.draw_keep_mask(x, rates=[rate] * self.num_slots), rate=rate)

    def draw_keep_mask(self, x: Tensor, *, rates: Sequence[float]) -> Bool[Tensor, "*shape"]:
        """Returns a mask for x, which has the rows of all slots (slot-major) or of `only_slot`.

        `rates` are the probabilities of False. A slot with rate 0 draws no random numbers. Raises ValueError if a
        backward pass draws the mask outside of `save_streams`, so that it would be another mask.
        """
        # -1: no backward pass is running. torch has no public function that tells this; its own activation
        # checkpointing calls this one.
        if torch._C._current_graph_task_id() != -1 and not self.is_drawing_again:
            raise ValueError(
                "Activation checkpointing must draw the dropout masks of a pack again, but it draws new ones. "
                "Give `torch.utils.checkpoint.checkpoint` a `context_fn` with `Slots.save_streams`."
            )
        if self.only_slot is not None:
            return self._draw_slot(self.only_slot, x.shape, x.device, rates[self.only_slot])
        check_slot_rows(x, self.num_slots)
        shape = torch.Size((len(x) // self.num_slots, *x.shape[1:]))
        return torch.cat([self._draw_slot(slot, shape, x.device, rate) for slot, rate in enumerate(rates)])

    def _draw_slot(self, slot: int, shape: torch.Size, device: torch.device, rate: float) -> Tensor:
        """Returns the mask of a slot. Padding, which its solo run does not have, is kept and draws nothing."""
        # A stream for each slot, not one for the pack: a slot's masks must not depend on which slots are beside it.
        # So a solo run draws the same, and slots may join, leave and move.
        if rate == 0:
            return torch.ones(shape, dtype=torch.bool, device=device)
        own = self._find_own_shape(shape, slot)
        drawn = draw_keep_mask(own, rate=rate, device=device, generator=self.generators[slot])
        if own == shape:
            return drawn
        keep = torch.ones(shape, dtype=torch.bool, device=device)
        keep[tuple(slice(size) for size in own)] = drawn
        return keep

    def _find_own_shape(self, shape: torch.Size, slot: int) -> torch.Size:
        """Returns the shape of a slot's part in its solo run.

        The part holds inputs (rows, length, ...) or probabilities (rows, heads, length, length).
        """
        if self.sequence_lengths is None:
            return shape
        length, padded = self.sequence_lengths[slot], max(self.sequence_lengths)
        if len(shape) == 4 and shape[2] == shape[3] == padded:
            return torch.Size((*shape[:2], length, length))
        return torch.Size((shape[0], length, *shape[2:])) if len(shape) >= 3 and shape[1] == padded else shape


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


def check_slot_rows(x: Tensor, num_slots: int) -> None:
    """Raises a ValueError if the number of rows of an input is not a multiple of the number of slots."""
    if x.dim() == 0 or x.shape[0] % num_slots:
        raise ValueError(
            f"The first dimension of a packed input must be a multiple of the {num_slots} slots, "
            f"but got shape {tuple(x.shape)}. Concatenate batches of equal size, one per slot."
        )
