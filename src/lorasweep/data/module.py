"""Batches for Lightning's Trainer, from parts that are already in memory. The last room of `data`; next: `training`."""

from __future__ import annotations

from typing import TypedDict

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from lorasweep.data.batching import StepBatchSampler
from lorasweep.data.parts import DataParts, Part

IGNORED = -100
"""A target that is not scored: what torch's cross-entropy ignores."""


class Batch(TypedDict):
    """What a model gets and what it shall predict."""

    input_ids: Tensor
    """(batch, block), int64."""
    targets: Tensor
    """(batch, block), int64: the token after each input; `IGNORED` is not scored."""


class BlockDataset(Dataset[Batch]):
    """Whole batches of a part's blocks, by lists of indices."""

    def __init__(self, part: Part) -> None:
        """Keeps the part; copies nothing."""
        self.part = part

    def __len__(self) -> int:
        """Returns the number of blocks."""
        return len(self.part.tokens)

    def __getitem__(self, indices: list[int]) -> Batch:
        """Returns one batch of the blocks at these indices."""
        blocks = self.part.tokens[torch.tensor(indices)]  # (batch, block + 1)
        return {"input_ids": blocks[:, :-1].contiguous(), "targets": blocks[:, 1:].contiguous()}


class TextDataModule(LightningDataModule):
    """Training batches in the order of `StepBatchSampler`, validation and test batches in the order of the text.

    Draws from no shared random stream, so how often one evaluates changes nothing in training. Runs of one worker share
    the parts and each have their own module.
    """

    def __init__(
        self,
        parts: DataParts,
        *,
        batch_size: int,
        accumulate: int,
        eval_batch_size: int,
        num_steps: int,
        seed: int,
        start_step: int = 0,
    ) -> None:
        """Keeps the parts; the test part is read when its loader is asked for.

        Args:
            parts: Token blocks.
            batch_size: Blocks per optimizer step; a multiple of `accumulate`.
            accumulate: Micro-batches per optimizer step.
            eval_batch_size: Blocks per validation or test batch; the last may be smaller.
            num_steps: Optimizer steps of the whole run.
            seed: Of the order of training blocks.
            start_step: First step to yield, for a run that goes on.
        """
        super().__init__()
        self.parts = parts
        self.eval_batch_size = eval_batch_size
        self.train_batches = StepBatchSampler(
            len(parts.train.tokens),
            batch_size=batch_size,
            num_steps=num_steps,
            seed=seed,
            start_step=start_step,
            accumulate=accumulate,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the micro-batches from `start_step` to the run's end, `accumulate` per step."""
        return _load_batches(self.parts.train, self.train_batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns every validation block once."""
        return self._load_in_order(self.parts.validation)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Returns every test block once."""
        return self._load_in_order(self.parts.test())

    def _load_in_order(self, part: Part) -> DataLoader[Batch]:
        order = SequentialSampler(range(len(part.tokens)))
        return _load_batches(part, BatchSampler(order, batch_size=self.eval_batch_size, drop_last=False))


def _load_batches(part: Part, batches: Sampler[list[int]]) -> DataLoader[Batch]:
    # A DataLoader draws a seed for its workers at every start: from this generator, not from torch's own.
    return DataLoader(BlockDataset(part), batch_size=None, sampler=batches, generator=torch.Generator().manual_seed(0))
