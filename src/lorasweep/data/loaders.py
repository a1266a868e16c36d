"""torch DataLoaders for splits that are in memory. Next: `training`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lorasweep.data.batching import WHOLE_BATCH, EvaluationSampler, MicroBatch, Share
from lorasweep.data.split import Batch, Split


class BatchDataset(Dataset[Batch]):
    """A torch data set whose items are whole batches of a split's examples."""

    def __init__(self, split: Split) -> None:
        """Keeps the split; copies nothing."""
        self.split = split

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.split)

    def __getitem__(self, micro: MicroBatch) -> Batch:
        """Returns the batch of these examples, with the weight of the step and the number of tokens without padding."""
        batch = self.split.batch(micro.indices)
        lengths = self.split.lengths[torch.tensor(micro.indices)]
        # an infinite weight marks a process without examples in this micro-batch, which gets a placeholder instead
        num_tokens = lengths.sum() if math.isfinite(micro.step_weight) else torch.zeros_like(lengths[0])
        return {**batch, "step_weight": torch.tensor(micro.step_weight), "num_tokens": num_tokens}


def evaluation_loader(split: Split, *, batch_size: int, share: Share = WHOLE_BATCH) -> DataLoader[Batch]:
    """Returns a loader of a split's examples, or of this share of them, each once, in `EvaluationSampler`'s order."""
    return load_batches(split, EvaluationSampler(split, batch_size=batch_size, share=share))


def load_batches(split: Split, batches: Iterable[MicroBatch]) -> DataLoader[Batch]:
    """Returns a loader of these batches of a split."""
    # A DataLoader draws a seed for its workers at every start: from this generator, not from torch's own.
    return BatchLoader(
        BatchDataset(split), batch_size=None, sampler=batches, generator=torch.Generator().manual_seed(0)
    )


class BatchLoader(DataLoader[Batch]):
    """A DataLoader without state to save in a checkpoint, because its sampler knows at which step to start."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict; without this method Lightning would treat the loader as one that can't resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: there is no state to load."""
