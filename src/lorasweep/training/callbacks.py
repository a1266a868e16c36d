"""What happens beside the steps of a run alone: its log, its checkpoint, pruning and stopping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lorasweep.config.run import TrainerConfig
from lorasweep.errors import Diverged, WorkerLost
from lorasweep.record import RunRecord
from lorasweep.training.checkpoint import save_checkpoint
from lorasweep.training.module import TrainingModule
from lorasweep.training.ranks import Ranks
from lorasweep.training.run_log import RunLog, Values, describe_stale, is_stale
from lorasweep.training.telemetry import Telemetry

ShouldStop = Callable[[int, int, float], bool]
"""`should_stop(slot, step, value)`: whether the run in a slot is to be pruned after this evaluation."""


class Saver(Protocol):
    """How the kept weights of a run are written."""

    def collect(self) -> None:
        """Makes them whole on the first rank where they are sharded; every rank calls it."""

    def save(self, folder: Path) -> None:
        """Writes them into a folder."""


class Logging(lightning.Callback):
    """Hands steps and evaluations to the run's log, and leaves a checkpoint at each evaluation.

    The clock is told what each moment goes to.
    """

    def __init__(self, run_log: RunLog, *, saver: Saver, start_step: int, telemetry: Telemetry, ranks: Ranks) -> None:
        self.run_log = run_log
        self.saver = saver
        self.ranks = ranks
        self.micro_losses: list[Tensor] = []
        self.lr = 0.0
        self.logged_step = start_step
        self.telemetry = telemetry
        self.counted_tokens = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leaves out what the clock of an earlier session counted."""
        self.counted_tokens = _tokens(pl_module)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins or goes on with training."""
        self.telemetry.switch("training")

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes the learning rate, which the schedule moves right after the step."""
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes a micro-batch; with the last one of a step, the step."""
        self.micro_losses.append(outputs["loss"].detach())  # its share, divided by Lightning
        if trainer.global_step > self.logged_step:
            self.logged_step = trainer.global_step
            assert isinstance(pl_module, TrainingModule)
            self.run_log.note_step(trainer.global_step, pl_module.summed_losses or self.micro_losses, self.lr)
            self.micro_losses = []

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the steps since the last evaluation."""
        self._flush(pl_module)
        self.ranks.barrier()
        self.telemetry.switch("evaluating")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the evaluation; the checkpoint comes last, so that a run that resumes there knows it."""
        self.telemetry.switch("saving")
        self.ranks.barrier()
        self.saver.collect()
        self.run_log.note_evaluation(trainer.global_step, validation_values(trainer), save=self.saver.save)
        self.ranks.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            save_trainer(trainer, self.run_log.folder, ranks=self.ranks)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes what is left."""
        self._flush(pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Writes the steps of a run that is stopped or fails."""
        if not isinstance(exception, Diverged | WorkerLost):
            self._flush(pl_module)

    def _flush(self, module: lightning.LightningModule) -> None:
        tokens = _tokens(module)  # waits for the device: its time is training's
        self.telemetry.add_tokens(tokens - self.counted_tokens)
        self.counted_tokens = tokens
        self.telemetry.switch("saving")
        self.run_log.flush(_speed(module))


class Pruning(lightning.Callback):
    """Ends the run where `should_stop` says so. What it says after the last step has no effect."""

    def __init__(self, should_stop: ShouldStop, *, metric: str, max_steps: int, ranks: Ranks) -> None:
        self.ranks = ranks
        self.should_stop = should_stop
        self.metric = metric
        self.max_steps = max_steps
        self.pruned_at: int | None = None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reports the evaluation and asks; of several ranks the first does, and all do what it was told."""
        step, value = trainer.global_step, validation_values(trainer)[self.metric]
        if self.ranks.any(self.ranks.is_first and self.should_stop(0, step, value)) and step < self.max_steps:
            self.pruned_at = step
            trainer.should_stop = True


class EarlyStopping(lightning.Callback):
    """Ends a run whose score no longer gets better, by the rule that packs have too."""

    def __init__(self, record: RunRecord, config: TrainerConfig) -> None:
        self.record = record
        self.config = config

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Looks at the record, in which this evaluation is."""
        if trainer.global_step < self.record.steps_planned and is_stale(self.record, self.config):
            self.record.reason = describe_stale(self.record)
            trainer.should_stop = True


class RunStopped(BaseException):
    """Leaves Lightning's loop at once (`trainer.should_stop` would evaluate first)."""


class Stopping(lightning.Callback):
    """Ends the run, with a checkpoint at the present step, once `stop_requested` says so on any rank."""

    def __init__(
        self, stop_requested: Callable[[], bool], folder: Path, *, eval_every_steps: int, ranks: Ranks
    ) -> None:
        self.stop_requested = stop_requested
        self.ranks = ranks
        self.folder = folder
        self.eval_every_steps = eval_every_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks after each optimizer step that no evaluation follows.

        Raises:
            RunStopped: The run is to end here.
        """
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        between = ends_step and trainer.global_step % self.eval_every_steps
        if between and self.ranks.any(self.stop_requested()):
            save_trainer(trainer, self.folder, ranks=self.ranks)
            raise RunStopped

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Asks after each evaluation, which left a checkpoint.

        Raises:
            RunStopped: The run is to end here.
        """
        if trainer.global_step < trainer.max_steps and self.ranks.any(self.stop_requested()):
            raise RunStopped


def validation_values(trainer: lightning.Trainer) -> Values:
    """Returns the metrics of the evaluation that just ended, by their names."""
    prefix = "validation/"
    metrics = trainer.callback_metrics
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}


def save_trainer(trainer: lightning.Trainer, folder: Path, *, ranks: Ranks) -> None:
    """Writes Lightning's checkpoint: only what trains, see `TrainingModule`. Every rank takes part, one writes."""
    if ranks.is_first:
        save_checkpoint(folder, kind="last", step=trainer.global_step, save=trainer.save_checkpoint)
    else:
        trainer.save_checkpoint(folder / "last.ckpt")


def _tokens(module: lightning.LightningModule) -> int:
    return module.tokens_trained if isinstance(module, TrainingModule) else 0


def _speed(module: lightning.LightningModule) -> float:
    return module.tokens_per_s if isinstance(module, TrainingModule) else 0.0
