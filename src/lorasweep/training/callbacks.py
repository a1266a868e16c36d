"""Lightning callbacks that `train_run` gives its Trainer: they write the run's folder, report, and stop the run.

`TrainingModule` also works without these callbacks, in a user's own Trainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lorasweep.config.run import TrainerConfig
from lorasweep.errors import Diverged
from lorasweep.record import RunStatus
from lorasweep.training.checkpoint import remove_older_checkpoints, save_checkpoint
from lorasweep.training.module import TrainingModule
from lorasweep.training.own_module import OwnModuleRun
from lorasweep.training.processes import run_on_first
from lorasweep.training.run_log import Metrics, RunLog, find_run_end
from lorasweep.training.telemetry import Telemetry

OnEvaluation = Callable[[int, Metrics], str | None]
"""`on_evaluation(step, metrics)` gets all metrics of an evaluation. Returns why the run must stop, or None."""


class RunStopped(BaseException):
    """Leaves Lightning's training loop immediately. `trainer.should_stop` would first run an evaluation."""


@dataclass(kw_only=True, eq=False)
class RunCallback(lightning.Callback):
    """Writes the run's folder, reports evaluations, and stops the training on request.

    If several processes train the run, only the first process writes and reports. The others follow its decision.
    """

    on_evaluation: OnEvaluation
    stop_requested: Callable[[], bool]
    folder: Path
    config: TrainerConfig
    telemetry: Telemetry
    run_log: RunLog | None
    """Only the first process has a log."""
    logged_step: int
    """Last logged step. Initially the step at which the training begins or resumes."""
    run: TrainingModule | OwnModuleRun = field(init=False)
    """The module that trains, or the wrapper of the user's own module."""
    lr: float = 0.0
    """Learning rate of the last step."""
    counted_tokens: int = 0
    """Trained tokens that `telemetry` has counted."""
    has_begun: bool = False
    """Whether this process has prepared the first batch."""
    evaluated_step: int = -1
    """Step of the last evaluation."""
    end: tuple[RunStatus, str | None] | None = None
    """The status and reason of a run that ends before its last step."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.counted_tokens = self.run.progress.tokens  # the tokens of the steps before the resume
        if self.run_log is not None:
            record = self.run_log.record
            record.trainable_params = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            record.trainable_fraction = record.trainable_params / record.total_params

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.telemetry.switch("training")
        if not self.has_begun and self._should_stop(trainer):  # the first batch may have taken minutes
            raise RunStopped
        self.has_begun = True

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.lr = optimizer.param_groups[0]["lr"]  # the schedule changes it right after the step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self.logged_step:
            self.logged_step = step
            if self.run_log is not None:
                self.run_log.note_step(step, self.run.step_losses, self.lr)
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # A run can't stop between a step and its evaluation: a resumed run assumes that a checkpoint of this step was
        # written after the evaluation. `on_validation_end` then checks for the stop request.
        if ends_step and step % self.config.eval_every_steps and self._should_stop(trainer):
            run_on_first(trainer.strategy, self._flush)
            _save_checkpoint(trainer, self.folder)
            raise RunStopped

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        run_on_first(trainer.strategy, self._flush)
        self.telemetry.switch("evaluating")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes and reports the evaluation, and stops if the run ends or is asked to stop."""
        self.telemetry.switch("saving")
        self.evaluated_step = trainer.global_step
        # In this order, a run that is killed between two of these actions repeats at most one interval.
        # 1. The rows, the kept weights and the record.
        whole_model = self.run.whole_model()
        run_on_first(trainer.strategy, lambda: self._write_evaluation(trainer, whole_model))
        # 2. The report. A run that is killed after it repeats the interval and reports the same values again, because
        #    this step has no checkpoint yet. So a run that must stop gets none: it would resume beyond its end.
        self.end = run_on_first(trainer.strategy, lambda: self._report(trainer))
        if self.end is not None:
            trainer.should_stop = True
        # 3. The checkpoint, from which the run resumes without reporting this evaluation again.
        elif trainer.state.fn == TrainerFn.FITTING:
            _save_checkpoint(trainer, self.folder)
        if trainer.global_step < trainer.max_steps and not trainer.should_stop and self._should_stop(trainer):
            raise RunStopped

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        run_on_first(trainer.strategy, self._flush)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        # `run_on_first` would wait for the other processes, which may be gone. When `Diverged` is raised, the steps are
        # already written.
        if not isinstance(exception, Diverged):
            self._flush()

    def _flush(self) -> None:
        """Counts the tokens since the last flush, and writes the steps on the first process."""
        progress = self.run.progress
        began = time.perf_counter()
        self.run.step_losses.cpu()  # waits for the device, which still counts as training
        progress.train_s += time.perf_counter() - began
        self.telemetry.add_tokens(progress.tokens - self.counted_tokens)
        self.counted_tokens = progress.tokens
        self.telemetry.switch("saving")
        if self.run_log is not None:
            self.run_log.flush(progress.tokens_per_s)

    def _write_evaluation(self, trainer: lightning.Trainer, model: nn.Module) -> None:
        assert self.run_log is not None
        self.run.progress.write_to(self.run_log.record)
        self.run_log.write_evaluation(
            trainer.global_step,
            self.run.get_metrics(),
            save=lambda folder: self.run.save_weights(model, folder),
        )

    def _report(self, trainer: lightning.Trainer) -> tuple[RunStatus, str | None] | None:
        """Reports the evaluation. Returns status and reason if the run ends before its last step."""
        assert self.run_log is not None
        record = self.run_log.record
        stop_reason = self.on_evaluation(trainer.global_step, self.run.get_metrics())
        # Lightning ends after the last step by itself
        is_last = record.steps_done >= record.steps_planned
        return None if is_last else find_run_end(record, self.config, stop_reason=stop_reason)

    def _should_stop(self, trainer: lightning.Trainer) -> bool:
        """Returns whether any process was asked to stop. Every process must call it at the same step."""
        return bool(trainer.strategy.reduce_boolean_decision(self.stop_requested(), all=False))


def _save_checkpoint(trainer: lightning.Trainer, folder: Path) -> None:
    """Writes Lightning's checkpoint of the trained parameters. Every process takes part, and the first writes."""
    if trainer.is_global_zero:
        save_checkpoint(folder, kind="last", step=trainer.global_step, save=trainer.save_checkpoint)
        remove_older_checkpoints(folder, kind="last")
    else:
        trainer.save_checkpoint(folder / "last.ckpt")
