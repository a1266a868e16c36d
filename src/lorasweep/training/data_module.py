"""The LightningDataModule of one run."""

from __future__ import annotations

from collections.abc import Sequence

import lightning
import torch
from torch.utils.data import DataLoader

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import (
    SINGLE_PROCESS,
    ProcessShare,
    SlotSampler,
    StepBatchSampler,
    build_evaluation_loader,
    build_loader,
)
from lorasweep.data.rows import Batch, move_batch
from lorasweep.errors import ConfigError
from lorasweep.tasks.splits import DataSplits
from lorasweep.training.inputs import SHARED_INPUTS, RunSettings, read_settings


class DataModule(lightning.LightningDataModule):
    """Yields training batches in an order that depends only on seed and step, and evaluation batches sorted by length.

    Lightning sees the whole run as one epoch. Its number of steps is the argument `max_steps` of the Lightning Trainer,
    or else the setting `trainer.max_steps`. A resumed run begins at the Trainer's step. The order does not use a shared
    random stream, so more frequent evaluations do not change the training. Each process gets its share of the examples
    of every batch.

    Attributes:
        config: The run's settings.
        splits: The data.
        accumulate: Micro-batches into which the batch of a step is cut.
    """

    def __init__(
        self,
        config: RunSettings,
        *,
        others: Sequence[RunConfig] = (),
        splits: DataSplits | None = None,
        accumulate: int | None = None,
    ) -> None:
        """Reads the data, unless `splits` is given. Reads the test split only when it is first used.

        Args:
            config: The settings of the `TrainingModule`, such as the arguments of `lorasweep train`.
            others: The settings of further runs, whose examples are in slots beside those of the first.
            splits: The data.
            accumulate: Micro-batches per batch. None: `trainer.accumulate`.

        Raises:
            ConfigError: A setting is wrong, or the data or the base model's tokenizer can't be loaded.
        """
        super().__init__()
        self.config = read_settings(config)
        self._seeds = [one.seeds.data_order for one in (self.config, *others)]
        self._eval_fraction = self.config.eval_fraction
        if splits is None:
            self._eval_fraction = 1.0  # in a user's own Trainer nothing scores the best weights on all examples later
            splits = SHARED_INPUTS.load(self.config).prepare(self.config, folder=None).data
        self.splits = splits
        self.accumulate = accumulate or self.config.trainer.accumulate

    @property
    def share(self) -> ProcessShare:
        """Selects the examples of this process."""
        if self.trainer is None:
            return SINGLE_PROCESS
        return ProcessShare(self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the micro-batches from the Trainer's step to the end of the run."""
        settings, trainer = self.config.trainer, self.trainer
        num_steps, start_step = settings.max_steps, 0
        if trainer is not None:
            if trainer.max_steps > 0:
                num_steps = trainer.max_steps
            elif trainer.max_epochs != 1:
                raise ConfigError(
                    "`Trainer(max_steps=...)` must be set, because the whole run is one epoch, but got "
                    f"max_epochs={trainer.max_epochs!r} alone."
                )
            if trainer.accumulate_grad_batches != self.accumulate:
                raise ConfigError(
                    f"`Trainer(accumulate_grad_batches={self.accumulate})` must hold, as `trainer.accumulate` cuts "
                    f"each batch, but got {trainer.accumulate_grad_batches}."
                )
            start_step = trainer.global_step
        samplers = [
            StepBatchSampler(
                self.splits.train,
                batch_size=settings.batch_size,
                num_steps=num_steps,
                seed=seed,
                group_by_length=self.config.data.groups_by_length,
                start_step=start_step,
                accumulate=self.accumulate,
                share=self.share,
            )
            for seed in self._seeds
        ]
        return build_loader(self.splits.train, SlotSampler(samplers))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return move_batch(batch, device)

    def val_dataloader(self) -> DataLoader[Batch]:
        return build_evaluation_loader(
            self.splits.validation,
            batch_size=max(1, self.config.trainer.eval_batch_size // len(self._seeds)),
            fraction=self._eval_fraction,
            share=self.share,
        )

    def test_dataloader(self) -> DataLoader[Batch]:
        return build_evaluation_loader(
            self.splits.test(), batch_size=self.config.trainer.eval_batch_size, share=self.share
        )
