"""The interface of a tokenised split, and the keys of its batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100
"""Target at positions that are not scored. It is the `ignore_index` of torch's cross-entropy."""
HOST_KEYS = ("num_tokens", "num_scored", "row_lengths")
"""Keys of a batch whose values stay on the CPU, which reads them. Reading them from a GPU would wait for it."""
NON_MODEL_KEYS = ("targets", "weights", "step_weight", *HOST_KEYS)
"""Keys of a batch that are not arguments of the model."""

Batch = dict[str, Tensor]
"""The model's arguments by name (such as `input_ids`, and `attention_mask` if an example is padded), and:

- `targets`: the next token at each position, (batch, length) int64, or `IGNORED`. For labels: one label per example.
- `weights`: the weight of each example's loss, (examples,) float. Only if weights differ.
- `step_weight`: the number that divides the step's loss, a scalar, or in a pack one for each slot. Only in training.
- `num_tokens`: number of positions without padding, a scalar. Only in batches of a loader.
- `num_scored`: number of scored tokens of each row. Only in moved batches of text.
- `row_lengths`: number of tokens of each row. Only in moved batches with an `attention_mask`.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split(Protocol):
    """One split of a data set: train, validation or test."""

    name: str
    """`train`, `validation` or `test`."""
    fingerprint: str
    """First 16 hex digits of a SHA-256 over all examples in order."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the test split. Notes about train and validation are in `DataSource.notes`."""
    groups: tuple[str, ...] = ()
    """The group of each example: its document, its prompt, or its value in the column `data.group`. Examples of a group
    depend on each other; the report takes groups as independent. Empty if each example is its own group."""

    @property
    @abstractmethod
    def lengths(self) -> Int[Tensor, " examples"]:
        """Number of tokens of each example."""

    @property
    @abstractmethod
    def weights(self) -> Float[Tensor, " examples"]:
        """Weight of each example in the loss: its number of scored tokens, or its class weight.

        The loss of a step is the sum over its examples divided by the sum of their weights.
        """

    def __len__(self) -> int:
        return len(self.lengths)

    def __hash__(self) -> int:
        return id(self)  # `lru_cache` needs a hash, and dataclasses with `eq=False` compare by identity

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns the examples at these indices, padded to the longest."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns the split's entry in a run record."""


def padding_fraction(lengths: Int[Tensor, " examples"], batches: Sequence[Sequence[int]]) -> float:
    """Returns the fraction of positions that is padding when each batch is padded to its longest example."""
    padded = sum(len(batch) * int(lengths[torch.tensor(batch)].max()) for batch in batches)
    real = sum(int(lengths[torch.tensor(batch)].sum()) for batch in batches)
    return 1.0 - real / padded if padded else 0.0


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Returns a batch of the CPU on `device`, except for what the CPU reads (`HOST_KEYS`), which is counted here."""
    counted = dict(batch)
    if batch["targets"].dim() == 2:
        counted["num_scored"] = (batch["targets"] != IGNORED).sum(1)
    if "attention_mask" in batch:
        counted["row_lengths"] = batch["attention_mask"].sum(1)
    return {name: value if name in HOST_KEYS else move_tensor(value, device) for name, value in counted.items()}


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on `device`. A copy from pinned memory to a GPU does not wait for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def repeat_batch(batch: Batch, *, slots: int) -> Batch:
    """Returns a batch repeated for every slot, slot after slot."""
    return {name: x.repeat(slots, *[1] * (x.dim() - 1)) if x.dim() else x for name, x in batch.items()}
