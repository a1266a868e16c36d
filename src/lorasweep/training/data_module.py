"""The LightningDataModule of one run."""

from __future__ import annotations

import lightning
from torch.utils.data import DataLoader

from lorasweep.config.run import RunConfig
from lorasweep.data.batching import WHOLE_BATCH, MicroBatch, Share, StepBatchSampler
from lorasweep.data.loaders import evaluation_loader, load_batches
from lorasweep.data.split import Batch
from lorasweep.data.splits import DataSplits
from lorasweep.errors import ConfigError
from lorasweep.training.inputs import share_inputs
from lorasweep.training.settings import Settings, read_settings


class DataModule(lightning.LightningDataModule):
    """Training batches of a whole run in an order that seed and step decide, and evaluation batches sorted by length.

    For a Trainer the whole run is one epoch of its `max_steps`, else of `trainer.max_steps`. A resumed run begins at
    the Trainer's step. Nothing is drawn from a shared random stream, so that evaluating more often does not change the
    training. Each process gets its share of the examples of every batch.

    Attributes:
        config: The run's settings.
        splits: The data.
        accumulate: Micro-batches into which the batch of a step is cut.
    """

    def __init__(self, config: Settings, *, splits: DataSplits | None = None, accumulate: int | None = None) -> None:
        """Takes settings, and reads the rows unless it is given them; those of the test split once they are asked for.

        Args:
            config: The settings of the run, the same as those of its `TrainingModule`: the words of `lorasweep train`.
            splits: The rows.
            accumulate: Micro-batches per batch; None takes `trainer.accumulate`, and 1 where that is `auto`.

        Raises:
            ConfigError: A setting is wrong, or the data or the base model's tokenizer can't be had.
        """
        super().__init__()
        self.config = read_settings(config)
        if splits is None:
            self._inputs = share_inputs(self.config)  # shared as long as somebody holds it
            splits = self._inputs.splits
        self.splits = splits
        self.accumulate = accumulate or accumulate_of(self.config)

    @property
    def share(self) -> Share:
        """Which rows of each batch are for this process, of those that train together."""
        return WHOLE_BATCH if self.trainer is None else Share(self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the micro-batches from the Trainer's step to the run's end.

        Raises:
            ConfigError: The Trainer wants several epochs.
        """
        settings, trainer = self.config.trainer, self.trainer
        num_steps, start_step, per_step = settings.max_steps, 0, self.accumulate
        if trainer is not None:
            if trainer.max_steps > 0:
                num_steps = trainer.max_steps
            elif trainer.max_epochs != 1:
                raise ConfigError(
                    "`Trainer(max_steps=...)` must be set, because the whole run is one epoch, but got "
                    f"max_epochs={trainer.max_epochs!r} alone."
                )
            start_step, per_step = trainer.global_step, trainer.accumulate_grad_batches
        batches = StepBatchSampler(
            self.splits.train,
            batch_size=settings.batch_size,
            num_steps=-(-num_steps * per_step // self.accumulate),
            seed=self.config.seeds.data_order,
            start_step=start_step * per_step // self.accumulate,
            accumulate=self.accumulate,
            share=self.share,
        )
        return load_batches(self.splits.train, batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns every validation row once, or this process's share of them."""
        return evaluation_loader(
            self.splits.validation, batch_size=self.config.trainer.eval_batch_size, share=self.share
        )

    def test_dataloader(self) -> DataLoader[Batch]:
        """Returns every test row once, or this process's share of them."""
        return evaluation_loader(self.splits.test(), batch_size=self.config.trainer.eval_batch_size, share=self.share)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Returns every test row once, in the rows' own order; Lightning deals the batches out to several processes."""
        split, size = self.splits.test(), self.config.trainer.eval_batch_size
        starts = range(0, len(split), size)
        return load_batches(split, [MicroBatch(list(range(n, min(n + size, len(split)))), 1.0) for n in starts])


def accumulate_of(config: RunConfig) -> int:
    """Returns the micro-batches per batch that settings ask for, 1 where they leave it open."""
    return 1 if config.trainer.accumulate == "auto" else config.trainer.accumulate
