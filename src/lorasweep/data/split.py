"""A split as training uses it: tokenised examples with lengths and weights, and batches of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100
"""Target of a position that is not scored; torch's cross-entropy ignores it."""
NOT_INPUTS = ("targets", "examples", "weights", "step_weight", "num_tokens")
"""Keys of a batch that the model does not get."""

Batch = dict[str, Tensor]
"""The model's arguments by name (`input_ids`, and `attention_mask` if an example is padded), and:

- `targets`: (batch, length) int64 of the next tokens, `IGNORED` where not scored; or one label per example.
- `examples`: (batch, length) int64, the example of each token; only if examples are packed into sequences.
- `weights`: (examples,) float, how much each example's loss counts; only if they differ.
- `step_weight` and `num_tokens`: scalars, the divisor of the step's loss and the number of positions without padding;
  only in batches of a loader.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split(Protocol):
    """One split of a data set: train, validation or test."""

    name: str
    """`train`, `validation` or `test`."""
    fingerprint: str
    """First 16 hex digits of the SHA-256 over names, texts and labels in order."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the test split. Those about the other splits are in `DataSource.notes`."""
    groups: tuple[str, ...] = ()
    """The group of each example: its document, its prompt, or a value of the column `data.group`. Examples of one group
    depend on each other, so the report resamples whole groups. Empty if each example is a group."""

    @property
    @abstractmethod
    def lengths(self) -> Int[Tensor, " examples"]:
        """Number of tokens of each example."""

    @property
    @abstractmethod
    def weights(self) -> Float[Tensor, " examples"]:
        """Weight of each example in the loss: its number of scored tokens, or its class weight.

        A step's loss is divided by the sum of the weights of its examples.
        """

    def __len__(self) -> int:
        return len(self.lengths)

    def __hash__(self) -> int:
        return id(self)  # caches of batch sizes have a split as key

    @abstractmethod
    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns the examples at these indices, padded to the longest.

        Args:
            indices: Examples of the split; slot-major for several slots, equally many for each.
            slots: Number of slots; examples of different slots never share a sequence.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns the split's entry in a run record."""


def padding_fraction(lengths: Int[Tensor, " examples"], batches: Sequence[Sequence[int]]) -> float:
    """Returns the fraction of positions that is padding when each batch is padded to its longest example."""
    padded = sum(len(batch) * int(lengths[torch.tensor(batch)].max()) for batch in batches)
    real = sum(int(lengths[torch.tensor(batch)].sum()) for batch in batches)
    return 1.0 - real / padded if padded else 0.0


def move_batch(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


def repeat_batch(batch: Batch, *, slots: int) -> Batch:
    """Returns a batch repeated for every slot, slot after slot."""
    if slots == 1:
        return batch
    repeated = {name: x.repeat(slots, *[1] * (x.dim() - 1)) if x.dim() else x for name, x in batch.items()}
    if "examples" in batch:
        # Examples are numbered from 0 in each slot, so later slots need numbers of their own.
        num_examples = int(batch["examples"].max()) + 1
        slot_of_row = torch.arange(slots, device=batch["examples"].device).repeat_interleave(len(batch["examples"]))
        repeated["examples"] = repeated["examples"] + num_examples * slot_of_row[:, None]
    return repeated
