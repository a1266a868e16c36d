"""Batches of the parts that are in memory, as torch loads them. The last room of `data`; next: `training`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lorasweep.data.batching import ALL, EvaluationSampler, MicroBatch, Share
from lorasweep.data.part import Batch, Part


class BatchDataset(Dataset[Batch]):
    """Whole batches of a part's rows."""

    def __init__(self, part: Part) -> None:
        """Keeps the part; copies nothing."""
        self.part = part

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.part)

    def __getitem__(self, micro: MicroBatch) -> Batch:
        """Returns the batch of these rows, with the weight of the whole step and the tokens that are no padding."""
        batch = self.part.batch(micro.indices)
        lengths = self.part.lengths[torch.tensor(micro.indices)]
        num_tokens = lengths.sum() if math.isfinite(micro.step_weight) else torch.zeros_like(lengths[0])
        return {**batch, "step_weight": torch.tensor(micro.step_weight), "num_tokens": num_tokens}


def evaluation_loader(part: Part, *, batch_size: int, share: Share = ALL) -> DataLoader[Batch]:
    """Returns every row of a part once, or this share of them, in the order of `EvaluationSampler`."""
    return load_batches(part, EvaluationSampler(part, batch_size=batch_size, share=share))


def load_batches(part: Part, batches: Iterable[MicroBatch]) -> DataLoader[Batch]:
    """Returns these batches of a part."""
    # A DataLoader draws a seed for its workers at every start: from this generator, not from torch's own.
    return BatchLoader(BatchDataset(part), batch_size=None, sampler=batches, generator=torch.Generator().manual_seed(0))


class BatchLoader(DataLoader[Batch]):
    """A loader of which the sampler knows where to begin, so that there is no state to keep in a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing; a loader without this method counts as one that can't be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Has nothing to load."""
