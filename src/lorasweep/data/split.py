"""What a split of a data set is to everything that trains on it: rows with lengths and weights, and batches of them.

`splits` makes splits of text blocks, `examples` of rows of their own; `batching` and `loaders` draw from them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100
"""A target that is not scored: what torch's cross-entropy ignores."""
NOT_INPUTS = ("targets", "examples", "weights", "step_weight", "num_tokens")
"""Keys of a batch that the model does not get."""

Batch = dict[str, Tensor]
"""What a model gets, under its own names (`input_ids`, and `attention_mask` where a row is padded), and beside it:

- `targets`: (batch, length) int64 of the next tokens, `IGNORED` where not scored; or one label per row.
- `examples`: (batch, length) int64, the row that each token belongs to; only where rows are packed into sequences.
- `weights`: (rows,) float, how much each row's mean loss counts; only where not every row counts alike.
- `step_weight` and `num_tokens`: scalars, what the step's loss is divided by and how many positions are no padding;
  only in batches of a loader.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split(Protocol):
    """One split of a data set."""

    name: str
    """`train`, `validation` or `test`."""
    fingerprint: str
    """SHA-256 over names, texts and labels in order, its first 16 hex digits."""
    notes: tuple[str, ...] = ()
    """Sentences on what only this split could tell; of the test split, which is read last."""

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """Tokens of each row, (rows,), int64."""

    @property
    @abstractmethod
    def weights(self) -> Tensor:
        """What each row adds to the divisor of a step's loss: its scored items, or its class weight; (rows,), float."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.lengths)

    def __hash__(self) -> int:
        """Tells splits apart by what they are, not by what they hold."""
        return id(self)

    @abstractmethod
    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns the rows at these indices, padded to the longest.

        Args:
            indices: Rows of the split; slot-major where they are for several slots, as many for each.
            slots: How many slots they are for; rows of different slots never share a sequence.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns what a run record keeps of the split."""


def padding_fraction(lengths: Tensor, batches: Sequence[Sequence[int]]) -> float:
    """Returns the share of positions that is padding when these batches are each padded to their longest row."""
    padded = sum(len(batch) * int(lengths[torch.tensor(batch)].max()) for batch in batches)
    real = sum(int(lengths[torch.tensor(batch)].sum()) for batch in batches)
    return 1.0 - real / padded if padded else 0.0


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Returns a batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def repeat_batch(batch: Batch, *, slots: int) -> Batch:
    """Returns a batch once for every slot, slot after slot."""
    if slots == 1:
        return batch
    repeated = {name: x.repeat(slots, *[1] * (x.dim() - 1)) if x.dim() else x for name, x in batch.items()}
    if "examples" in batch:
        per_slot = int(batch["examples"].max()) + 1
        first = (
            torch.arange(slots, device=batch["examples"].device).repeat_interleave(len(batch["examples"])) * per_slot
        )
        repeated["examples"] = repeated["examples"] + first[:, None]
    return repeated
