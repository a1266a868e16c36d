"""The callback of a run alone: its log, its reports, its checkpoints, and how it pauses or stops.

A Trainer of one's own needs none of this; the model's side of training is in `module`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lorasweep.config.run import TrainerConfig
from lorasweep.errors import Diverged
from lorasweep.training.averaging import WeightAveraging
from lorasweep.training.checkpoint import remove_older_checkpoints, save_checkpoint
from lorasweep.training.module import TrainingModule
from lorasweep.training.processes import on_first
from lorasweep.training.run_log import RunLog, Values
from lorasweep.training.run_record import end_at_evaluation
from lorasweep.training.telemetry import Telemetry

OnEvaluation = Callable[[int, Values], bool]
"""`on_evaluation(step, values)`: takes every metric of an evaluation and returns whether the run continues (False: it
is paused)."""


class RunStopped(BaseException):
    """Leaves Lightning's loop at once (`trainer.should_stop` would evaluate first)."""


class RunCallback(lightning.Callback):
    """Writes what a run leaves in its folder, reports its evaluations, and ends the session when asked to.

    Of several processes the first alone writes and reports, and all of them follow its decision (`on_first`).

    Attributes:
        evaluated_step: Step of the last evaluation.
        paused: Whether the run was paused.
    """

    def __init__(
        self,
        on_evaluation: OnEvaluation,
        stop_requested: Callable[[], bool],
        *,
        run_log: RunLog | None,
        folder: Path,
        config: TrainerConfig,
        averaging: WeightAveraging | None,
        start_step: int,
        telemetry: Telemetry,
    ) -> None:
        """Takes the run's log, which is None on all processes but the first."""
        self.on_evaluation = on_evaluation
        self.stop_requested = stop_requested
        self.run_log = run_log  # Lightning gives every callback a `log` of its own
        self.folder = folder
        self.config = config
        self.averaging = averaging
        self.telemetry = telemetry
        self.lr = 0.0
        self.logged_step = start_step
        self.counted_tokens = 0
        self.evaluated_step = -1
        self.paused = False

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Notes how many parameters train, and how many tokens earlier sessions have counted."""
        self.counted_tokens = _own(pl_module).progress.tokens_trained
        if self.run_log is not None:
            record = self.run_log.record
            record.trainable_params = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            record.trainable_fraction = record.trainable_params / record.total_params

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts time as training from here on."""
        self.telemetry.switch("training")

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes the learning rate, which the schedule changes right after the step."""
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes a complete step, and stops after it if that was asked for.

        Raises:
            RunStopped: The session ends here, with a checkpoint.
        """
        step = trainer.global_step
        if step > self.logged_step:
            self.logged_step = step
            if self.run_log is not None:
                self.run_log.note_step(step, _own(pl_module).step_losses, self.lr)
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # A step that an evaluation follows is not a place to stop: its checkpoint would be taken for one after the
        # evaluation. `on_validation_end` asks again.
        if ends_step and step % self.config.eval_every_steps and self._should_stop(trainer):
            on_first(trainer.strategy, lambda: self._flush(pl_module))
            _save_checkpoint(trainer, self.folder)
            raise RunStopped

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the steps since the last evaluation."""
        on_first(trainer.strategy, lambda: self._flush(pl_module))
        self.telemetry.switch("evaluating")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes and reports the evaluation, and ends the session if the run is paused, complete or asked to stop.

        Raises:
            RunStopped: The session ends here.
        """
        self.telemetry.switch("saving")
        self.evaluated_step = trainer.global_step
        # The order of the next three actions makes a run that is killed between them repeat at most one interval.
        # 1. The rows, the kept weights and the record.
        whole = _own(pl_module).whole_model()
        on_first(trainer.strategy, lambda: self._note_evaluation(trainer, _own(pl_module), whole))
        # 2. The report. A paused run is closed here: a run that is killed later either is paused, or has no checkpoint
        #    of this step yet, repeats the interval and reports the same value again.
        status = on_first(trainer.strategy, lambda: self._report(trainer))
        self.paused = status == "paused"
        # 3. The checkpoint, from which the run resumes without reporting this evaluation again.
        if trainer.state.fn == TrainerFn.FITTING:
            _save_checkpoint(trainer, self.folder)
        # Last, because all of the above saves the mean of the weights in their place.
        if self.averaging is not None:
            self.averaging.restore_weights(pl_module)
        if status is not None:
            trainer.should_stop = True
        if trainer.global_step < trainer.max_steps and not trainer.should_stop and self._should_stop(trainer):
            raise RunStopped

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the steps since the last evaluation."""
        on_first(trainer.strategy, lambda: self._flush(pl_module))

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Writes the steps of a run that fails, on this process alone: the others may be gone."""
        if self.averaging is not None:
            self.averaging.restore_weights(pl_module)
        if not isinstance(exception, Diverged):  # which was raised while the steps were written
            self._flush(pl_module)

    def _flush(self, module: lightning.LightningModule) -> None:
        """Counts the tokens since the last flush, and writes the steps on the first process."""
        progress = _own(module).progress
        tokens = progress.tokens_trained  # waits for the device, so the clock is switched after it
        self.telemetry.add_tokens(tokens - self.counted_tokens)
        self.counted_tokens = tokens
        self.telemetry.switch("saving")
        if self.run_log is not None:
            self.run_log.flush(progress.tokens_per_s)

    def _note_evaluation(self, trainer: lightning.Trainer, module: TrainingModule, model: nn.Module) -> None:
        assert self.run_log is not None
        module.progress.note_in(self.run_log.record)
        self.run_log.note_evaluation(
            trainer.global_step,
            _validation_values(trainer),
            save=lambda folder: module.method.save(model, folder, base=module.base),
        )

    def _report(self, trainer: lightning.Trainer) -> str | None:
        """Reports the evaluation, and returns the status with which the run ends before its last step; else None."""
        assert self.run_log is not None
        record = self.run_log.record
        continues = self.on_evaluation(trainer.global_step, _validation_values(trainer))
        end = end_at_evaluation(record, self.config, pauses=not continues)
        if end is None or record.steps_done >= record.steps_planned:  # Lightning ends after the last step by itself
            return None
        status, record.reason = end
        if status == "paused":
            self.run_log.close(status, record.reason)
        return status

    def _should_stop(self, trainer: lightning.Trainer) -> bool:
        """Returns whether any process was asked to stop. Every process must call it at the same step."""
        return bool(trainer.strategy.reduce_boolean_decision(self.stop_requested(), all=False))


class KeepSignalHandler(lightning.Callback):
    """Keeps the process's own handler of SIGTERM in place of Lightning's.

    Lightning's handler sends a message to the other processes, whatever they do at that moment, and raises in the
    middle of a step. While it is in place SIGTERM is blocked, so that no signal meets it.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)
        self.is_main = threading.current_thread() is threading.main_thread()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Blocks SIGTERM: Lightning sets its handler after this."""
        if self.is_main:  # Python allows no other thread to set a handler
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restores the process's handler, just after Lightning has set its own."""
        self.restore()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restores it for a run that is evaluated only."""
        self.restore()

    def restore(self) -> None:
        """Restores the process's handler, and lets a signal through that came meanwhile."""
        if self.is_main:
            signal.signal(signal.SIGTERM, self.handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _validation_values(trainer: lightning.Trainer) -> Values:
    """Returns the metrics of the evaluation that just ended, by their names."""
    prefix = "validation/"
    metrics = trainer.callback_metrics
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}


def _save_checkpoint(trainer: lightning.Trainer, folder: Path) -> None:
    """Writes Lightning's checkpoint of the trained parameters. Every process takes part, and the first writes."""
    if trainer.is_global_zero:
        save_checkpoint(folder, kind="last", step=trainer.global_step, save=trainer.save_checkpoint)
        remove_older_checkpoints(folder, kind="last")
    else:
        trainer.save_checkpoint(folder / "last.ckpt")


def _own(module: lightning.LightningModule) -> TrainingModule:
    assert isinstance(module, TrainingModule)
    return module
