"""What happens beside the steps of a run alone: its log, its reports, its checkpoints, pausing and stopping.

At an evaluation the callbacks act in this order, in which a killed run repeats at most one interval:

1. `Logging` writes the rows, the kept weights and the record.
2. `Settling` reports the value. Where the run is paused it closes the record: a run that is killed from here on either
   is paused, or has no checkpoint of this step yet, repeats the interval and reports the same value again.
3. `Checkpointing` writes the checkpoint, from which the run then resumes without reporting again.

Of several processes the first alone writes and reports; all of them do what came of it (`on_first`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lorasweep.config.run import TrainerConfig
from lorasweep.errors import Diverged
from lorasweep.record import RunRecord
from lorasweep.training.checkpoint import remove_older_checkpoints, save_checkpoint
from lorasweep.training.module import TrainingModule
from lorasweep.training.processes import on_first
from lorasweep.training.run_log import RunLog, Values, describe_pause, describe_stale, is_stale
from lorasweep.training.telemetry import Telemetry

GoesOn = Callable[[int, Values], bool]
"""`on_evaluation(step, values)`: takes every metric of an evaluation and returns whether the run goes on (False: it is
paused)."""


def go_on(step: int, values: Values) -> bool:
    """The `on_evaluation` of a run that nothing pauses."""
    return True


class Logging(lightning.Callback):
    """Hands steps and evaluations to the run's log, and tells the clock what each moment goes to.

    Attributes:
        evaluated_step: The step of the last evaluation.
    """

    def __init__(self, run_log: RunLog | None, *, start_step: int, telemetry: Telemetry) -> None:
        """Takes the log; None on processes beside the first."""
        self.run_log = run_log
        self.lr = 0.0
        self.logged_step = start_step
        self.evaluated_step = -1
        self.telemetry = telemetry
        self.counted_tokens = 0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Puts into the record what trains, and leaves out what the clock of an earlier session counted."""
        self.counted_tokens = _own(pl_module).tokens_trained
        if self.run_log is not None:
            record = self.run_log.record
            record.trainable_params = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            record.trainable_fraction = record.trainable_params / record.total_params

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
        """Notes the step that a micro-batch completed."""
        if trainer.global_step > self.logged_step:
            self.logged_step = trainer.global_step
            if self.run_log is not None:
                self.run_log.note_step(trainer.global_step, [_own(pl_module).step_losses], self.lr)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the steps since the last evaluation."""
        on_first(trainer.strategy, lambda: self.flush(pl_module))
        self.telemetry.switch("evaluating")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the evaluation."""
        self.telemetry.switch("saving")
        self.evaluated_step = trainer.global_step
        whole = _own(pl_module).whole_model()
        on_first(trainer.strategy, lambda: self._note_evaluation(trainer, _own(pl_module), whole))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes what is left."""
        on_first(trainer.strategy, lambda: self.flush(pl_module))

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Writes the steps of a run that fails; the other processes may be gone."""
        if not isinstance(exception, Diverged):
            self.flush(pl_module)

    def flush(self, module: lightning.LightningModule) -> None:
        """Writes the steps that are not written yet; the others than the first process have nothing to write."""
        own = _own(module)
        tokens = own.tokens_trained  # waits for the device: its time is training's
        self.telemetry.add_tokens(tokens - self.counted_tokens)
        self.counted_tokens = tokens
        self.telemetry.switch("saving")
        if self.run_log is not None:
            self.run_log.flush(own.tokens_per_s)

    def _note_evaluation(self, trainer: lightning.Trainer, module: TrainingModule, model: nn.Module) -> None:
        assert self.run_log is not None
        note_progress(self.run_log.record, module)
        self.run_log.note_evaluation(
            trainer.global_step,
            validation_values(trainer),
            save=lambda folder: module.method.save(model, folder, base=module.base),
        )


class Settling(lightning.Callback):
    """Reports each evaluation, and ends the session where the run is to pause or no longer gets better.

    What `on_evaluation` returns has no effect on a run that ends anyway: after its last step, or by early stopping.

    Attributes:
        paused: Whether the run was paused.
    """

    def __init__(self, on_evaluation: GoesOn, *, run_log: RunLog | None, config: TrainerConfig) -> None:
        self.on_evaluation = on_evaluation
        self.run_log = run_log
        self.config = config
        self.paused = False

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Has all processes do what the first is told."""
        decision = on_first(trainer.strategy, lambda: self._decide(trainer))
        self.paused = decision == "pause"
        if decision != "go on":
            trainer.should_stop = True

    def _decide(self, trainer: lightning.Trainer) -> Literal["go on", "end", "pause"]:
        assert self.run_log is not None
        record, step = self.run_log.record, trainer.global_step
        goes_on = self.on_evaluation(step, validation_values(trainer))
        if step >= record.steps_planned:
            return "go on"
        if is_stale(record, self.config):
            record.reason = describe_stale(record)
            return "end"
        if goes_on:
            return "go on"
        self.run_log.close("paused", describe_pause(record))
        return "pause"


class Checkpointing(lightning.Callback):
    """Leaves a checkpoint at each evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes it, unless training is over."""
        if trainer.state.fn == TrainerFn.FITTING:
            save_trainer(trainer, self.folder)


class RunStopped(BaseException):
    """Leaves Lightning's loop at once (`trainer.should_stop` would evaluate first)."""


class Stopping(lightning.Callback):
    """Ends the run, with a checkpoint at the present step, once `stop_requested` says so on any process."""

    def __init__(
        self, stop_requested: Callable[[], bool], folder: Path, *, eval_every_steps: int, logging: Logging
    ) -> None:
        self.stop_requested = stop_requested
        self.folder = folder
        self.eval_every_steps = eval_every_steps
        self.logging = logging

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks after each optimizer step that no evaluation follows.

        Raises:
            RunStopped: The run is to end here.
        """
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if ends_step and trainer.global_step % self.eval_every_steps and self._is_requested(trainer):
            on_first(trainer.strategy, lambda: self.logging.flush(pl_module))
            save_trainer(trainer, self.folder)
            raise RunStopped

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Asks after each evaluation, which left a checkpoint, unless the run ends there by itself.

        Raises:
            RunStopped: The run is to end here.
        """
        if trainer.global_step < trainer.max_steps and not trainer.should_stop and self._is_requested(trainer):
            raise RunStopped

    def _is_requested(self, trainer: lightning.Trainer) -> bool:
        """Whether any process was asked to stop; every process must call it at the same step."""
        return bool(trainer.strategy.reduce_boolean_decision(self.stop_requested(), all=False))


class KeepSignalHandler(lightning.Callback):
    """Keeps this process's own handler of SIGTERM in place of Lightning's.

    Lightning's sends a message to the other processes from inside of the handler, where they may be in the middle of
    another one, and raises in the middle of a step. While it is in place SIGTERM is held back.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)
        self.is_main = threading.current_thread() is threading.main_thread()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Holds SIGTERM back: Lightning sets its handler after this."""
        if self.is_main:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Puts it back: Lightning has set its own just before."""
        self.put_back()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Puts it back where there is no training."""
        self.put_back()

    def put_back(self) -> None:
        """Puts it back and lets a signal through that came meanwhile."""
        if self.is_main:  # Python allows no other thread to set one
            signal.signal(signal.SIGTERM, self.handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def validation_values(trainer: lightning.Trainer) -> Values:
    """Returns the metrics of the evaluation that just ended, by their names."""
    prefix = "validation/"
    metrics = trainer.callback_metrics
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}


def note_progress(record: RunRecord, module: TrainingModule) -> None:
    """Puts into a record how much its run has trained."""
    record.tokens_trained, record.tokens_per_s = module.tokens_trained, module.tokens_per_s
    record.batching["padding_fraction"]["train"] = round(module.padding_fraction, 4)


def save_trainer(trainer: lightning.Trainer, folder: Path) -> None:
    """Writes Lightning's checkpoint: only what trains, see `TrainingModule`. Every process takes part, one writes.

    The last two stay.
    """
    if trainer.is_global_zero:
        save_checkpoint(folder, kind="last", step=trainer.global_step, save=trainer.save_checkpoint)
        remove_older_checkpoints(folder, kind="last")
    else:
        trainer.save_checkpoint(folder / "last.ckpt")


def _own(module: lightning.LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module
