"""The slots of a pack: their solo models, and the random streams of their dropout masks.

A slot draws masks in the same order and shapes as its solo run. With equal seeds, the masks are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lorasweep.lora.dropout import draw_keep_mask


class Slots:
    """The slots of a pack. All layers of the pack share this object.

    Attributes:
        models: The solo model of each slot. It shares the frozen base, and its trainable parameters are the pack's.
        generators: Dropout stream of each slot, on the device of the inputs; None draws from torch's default stream.
        only_slot: The one slot whose rows the layers get, while a module is computed slot by slot; otherwise None.
        stacks: Inside `stack_once`: the stacked matrices, and their leaves, which collect the gradients; else None.
        sequence_lengths: Length of each slot's sequences before padding to the longest slot; None if no slot is padded.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = list(models)
        self.generators: list[torch.Generator | None] = [None] * len(models)
        self.only_slot: int | None = None
        self.stacks: dict[object, tuple[Tensor, Tensor]] | None = None
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

    @contextmanager
    def stack_once(self) -> Iterator[None]:
        """Lets all forward passes inside the block use the same stacked matrices, and adds up their gradients.

        A step with several micro-batches stacks A and B of all slots once. The parameters get their gradients at the
        end of the block, and must not change inside it.
        """
        self.stacks = {}
        try:
            yield
            pairs = [pair for pair in self.stacks.values() if pair[1].grad is not None]
            torch.autograd.backward([stacked for stacked, _ in pairs], [leaf.grad for _, leaf in pairs])
        finally:
            self.stacks = None

    def share_stack(self, key: object, stack: Callable[[], Tensor]) -> Tensor:
        """Returns the result of `stack()`; inside `stack_once`, a leaf with its values, which is made once per key."""
        if self.stacks is None:
            return stack()
        if key not in self.stacks:
            stacked = stack()
            self.stacks[key] = stacked, stacked.detach().requires_grad_(stacked.requires_grad)
        return self.stacks[key][1]

    def draw_keep_mask(self, x: Tensor, *, rates: Sequence[float]) -> Bool[Tensor, "*shape"]:
        """Returns a mask for x that is False for each dropped element.

        Args:
            x: Has the rows of all slots (slot-major), or of `only_slot`.
            rates: Probability of False for each slot. A slot with rate 0 draws no random numbers.

        Raises:
            ValueError: A backward pass is running. It would draw another mask than the forward pass.
        """
        if torch._C._current_graph_task_id() != -1:  # -1: no backward pass is running
            raise ValueError(
                "Dropout in a pack must be drawn once, but activation checkpointing draws it again. "
                "Set `method.dropout` and `model.dropout` to 0, or `trainer.activation_checkpointing` to false."
            )
        if self.only_slot is not None:
            return self._draw_slot(self.only_slot, x.shape, x.device, rates[self.only_slot])
        check_rows(x, self.num_slots)
        shape = torch.Size((len(x) // self.num_slots, *x.shape[1:]))
        return torch.cat([self._draw_slot(slot, shape, x.device, rate) for slot, rate in enumerate(rates)])

    def _draw_slot(self, slot: int, shape: torch.Size, device: torch.device, rate: float) -> Tensor:
        """Returns the mask of a slot. Padding, which its solo run does not have, is kept and draws nothing."""
        padded = torch.ones(shape, dtype=torch.bool, device=device)
        if rate == 0:
            return padded
        lengths = self.sequence_lengths
        if lengths is None or len(shape) < 3 or shape[1] != max(lengths) or shape[1] == lengths[slot]:
            return draw_keep_mask(shape, rate=rate, device=device, generator=self.generators[slot])
        unpadded = torch.Size((shape[0], lengths[slot], *shape[2:]))
        drawn = draw_keep_mask(unpadded, rate=rate, device=device, generator=self.generators[slot])
        padded[:, : lengths[slot]] = drawn
        return padded


def check_rows(x: Tensor, num_slots: int) -> None:
    """Raises a ValueError if the number of rows of an input is not a multiple of the number of slots."""
    if x.dim() == 0 or x.shape[0] % num_slots:
        raise ValueError(
            f"The first dimension of a packed input must be a multiple of the {num_slots} slots, "
            f"but got shape {tuple(x.shape)}. Concatenate batches of equal size, one per slot."
        )
