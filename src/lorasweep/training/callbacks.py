"""What happens beside the steps of a run alone: its log, its reports, its checkpoints, pausing and stopping.

At an evaluation the callbacks act in this order, in which a killed run repeats at most one interval:

1. `Logging` writes the rows, the kept weights and the record.
2. `Settling` reports the value. Where the run is paused it closes the record: a run that is killed from here on either
   is paused, or has no checkpoint of this step yet, repeats the interval and reports the same value again.
3. `Checkpointing` writes the checkpoint, from which the run then resumes without reporting again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lorasweep.config.run import TrainerConfig
from lorasweep.errors import Diverged
from lorasweep.record import RunRecord
from lorasweep.training.checkpoint import remove_older_checkpoints, save_checkpoint
from lorasweep.training.module import TrainingModule
from lorasweep.training.ranks import Ranks
from lorasweep.training.run_log import RunLog, Values, describe_pause, describe_stale, is_stale
from lorasweep.training.telemetry import Telemetry

GoesOn = Callable[[int, Values], bool]
"""`on_evaluation(step, values)`: takes every metric of an evaluation and returns whether the run goes on (False: it is
paused)."""


def go_on(step: int, values: Values) -> bool:
    """The `on_evaluation` of a run that nothing pauses."""
    return True


class Saver(Protocol):
    """How the kept weights of a run are written."""

    def collect(self) -> None:
        """Makes them whole on the first rank where they are sharded; every rank calls it."""

    def save(self, folder: Path) -> None:
        """Writes them into a folder."""


class Logging(lightning.Callback):
    """Hands steps and evaluations to the run's log, and tells the clock what each moment goes to."""

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
        """Writes the evaluation."""
        self.telemetry.switch("saving")
        self.ranks.barrier()
        self.saver.collect()
        assert isinstance(pl_module, TrainingModule)
        note_progress(self.run_log.record, pl_module)
        self.run_log.note_evaluation(trainer.global_step, validation_values(trainer), save=self.saver.save)
        self.ranks.barrier()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes what is left."""
        self._flush(pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Writes the steps of a run that is stopped or fails."""
        if not isinstance(exception, Diverged):
            self._flush(pl_module)

    def _flush(self, module: lightning.LightningModule) -> None:
        tokens = _tokens(module)  # waits for the device: its time is training's
        self.telemetry.add_tokens(tokens - self.counted_tokens)
        self.counted_tokens = tokens
        self.telemetry.switch("saving")
        self.run_log.flush(_speed(module))


class Settling(lightning.Callback):
    """Reports each evaluation, and ends the session where the run is to pause or no longer gets better.

    What `on_evaluation` returns has no effect on a run that ends anyway: after its last step, or by early stopping.

    Attributes:
        paused: Whether the run was paused.
    """

    def __init__(self, on_evaluation: GoesOn, *, run_log: RunLog, config: TrainerConfig, ranks: Ranks) -> None:
        self.on_evaluation = on_evaluation
        self.run_log = run_log
        self.config = config
        self.ranks = ranks
        self.paused = False

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Of several ranks the first reports, and all do what it was told."""
        record, step = self.run_log.record, trainer.global_step
        values = validation_values(trainer)
        pauses = self.ranks.any(self.ranks.is_first and not self.on_evaluation(step, values))
        if step >= record.steps_planned:
            return
        if is_stale(record, self.config):
            record.reason = describe_stale(record)
            trainer.should_stop = True
        elif pauses:
            self.paused = True
            trainer.should_stop = True
            self.run_log.close("paused", describe_pause(record))


class Checkpointing(lightning.Callback):
    """Leaves a checkpoint at each evaluation."""

    def __init__(self, folder: Path, *, ranks: Ranks) -> None:
        self.folder = folder
        self.ranks = ranks

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes it, unless training is over."""
        if trainer.state.fn == TrainerFn.FITTING:
            save_trainer(trainer, self.folder, ranks=self.ranks)


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
        """Asks after each evaluation, which left a checkpoint, unless the run ends there by itself.

        Raises:
            RunStopped: The run is to end here.
        """
        goes_on = trainer.global_step < trainer.max_steps and not trainer.should_stop
        if goes_on and self.ranks.any(self.stop_requested()):
            raise RunStopped


def validation_values(trainer: lightning.Trainer) -> Values:
    """Returns the metrics of the evaluation that just ended, by their names."""
    prefix = "validation/"
    metrics = trainer.callback_metrics
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}


def note_progress(record: RunRecord, module: TrainingModule) -> None:
    """Puts into a record how much its run has trained."""
    record.tokens_trained, record.tokens_per_s = module.tokens_trained, module.tokens_per_s
    record.batching["padding_fraction"]["train"] = round(module.padding_fraction, 4)


def save_trainer(trainer: lightning.Trainer, folder: Path, *, ranks: Ranks) -> None:
    """Writes Lightning's checkpoint: only what trains, see `TrainingModule`. Every rank takes part, one writes.

    The last two stay.
    """
    if ranks.is_first:
        save_checkpoint(folder, kind="last", step=trainer.global_step, save=trainer.save_checkpoint)
        remove_older_checkpoints(folder, kind="last")
    else:
        trainer.save_checkpoint(folder / "last.ckpt")


def _tokens(module: lightning.LightningModule) -> int:
    return module.tokens_trained if isinstance(module, TrainingModule) else 0


def _speed(module: lightning.LightningModule) -> float:
    return module.tokens_per_s if isinstance(module, TrainingModule) else 0.0
