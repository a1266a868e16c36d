"""Batches for Lightning's Trainer, from parts that are already in memory. The last room of `data`; next: `training`."""

from __future__ import annotations

import math

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from lorasweep.data.batching import ALL, EvaluationSampler, MicroBatch, Share, StepBatchSampler
from lorasweep.data.part import Batch, Part
from lorasweep.data.parts import DataParts


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


class DataModule(LightningDataModule):
    """Training batches in the order of `StepBatchSampler`, validation and test batches sorted by length.

    Draws from no shared random stream, so how often one evaluates changes nothing in training. Runs of one worker share
    the parts and each have their own module. Of several processes each gets its rows of every batch, so the Trainer
    must not share out whole batches (`use_distributed_sampler=False`).
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
            parts: The rows.
            batch_size: Rows per optimizer step; a multiple of `accumulate`.
            accumulate: Micro-batches per optimizer step.
            eval_batch_size: Longest rows per validation or test batch; of shorter ones there are more.
            num_steps: Optimizer steps of the whole run.
            seed: Of the order of training rows.
            start_step: First step to yield, for a run that goes on.
        """
        super().__init__()
        self.parts = parts
        self.eval_batch_size = eval_batch_size
        self.train_batches = StepBatchSampler(
            parts.train,
            batch_size=batch_size,
            num_steps=num_steps,
            seed=seed,
            start_step=start_step,
            accumulate=accumulate,
        )

    @property
    def share(self) -> Share:
        """Which rows of each batch are for this process, of those that train together."""
        return ALL if self.trainer is None else Share(self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the micro-batches from `start_step` to the run's end, `accumulate` per step."""
        self.train_batches.share = self.share
        return load_batches(self.parts.train, self.train_batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns every validation row once, or this share of them."""
        return evaluation_loader(self.parts.validation, batch_size=self.eval_batch_size, share=self.share)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Returns every test row once, or this share of them."""
        return evaluation_loader(self.parts.test(), batch_size=self.eval_batch_size, share=self.share)


def evaluation_loader(part: Part, *, batch_size: int, share: Share = ALL) -> DataLoader[Batch]:
    """Returns every row of a part once, or this share of them, in the order of `EvaluationSampler`."""
    return load_batches(part, EvaluationSampler(part, batch_size=batch_size, share=share))


def load_batches(part: Part, batches: Sampler[MicroBatch]) -> DataLoader[Batch]:
    """Returns these batches of a part."""
    # A DataLoader draws a seed for its workers at every start: from this generator, not from torch's own.
    return DataLoader(BatchDataset(part), batch_size=None, sampler=batches, generator=torch.Generator().manual_seed(0))
