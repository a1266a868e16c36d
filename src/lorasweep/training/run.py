"""One run: composes base model, data, method, LightningModule and Trainer, and keeps the record of what happened."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger

from lorasweep.config.run import RunConfig
from lorasweep.errors import OutOfMemory
from lorasweep.record import RunRecord, RunStatus, read_run
from lorasweep.training.averaging import WeightAveraging
from lorasweep.training.callbacks import KeepSignalHandler, OnEvaluation, RunCallback, RunStopped
from lorasweep.training.checkpoint import FoundCheckpoint, find_checkpoint, remove_checkpoints
from lorasweep.training.components import build_callbacks, build_profiler, open_loggers
from lorasweep.training.data_module import DataModule
from lorasweep.training.environment import deterministic_algorithms, reset_peak_memory, resolve_device
from lorasweep.training.failures import describe_failure, memory_errors_as_ours, status_after
from lorasweep.training.inputs import RunInputs, describe_batching, resolve_accumulate
from lorasweep.training.module import TrainingModule
from lorasweep.training.processes import (
    build_strategy,
    explain_failure,
    find_launch,
    join_processes,
    on_first,
    require_same,
    take_failure_note,
)
from lorasweep.training.quiet import quiet_lightning
from lorasweep.training.run_log import RunLog, RunPlace, Values
from lorasweep.training.run_record import end_at_evaluation, open_record


def never_stop() -> bool:
    """The `stop_requested` of a run that nothing interrupts."""
    return False


def never_pause(step: int, values: Values) -> bool:
    """The `on_evaluation` of a run that nothing pauses."""
    return True


def train_run(
    config: RunConfig,
    place: RunPlace,
    *,
    inputs: RunInputs,
    on_evaluation: OnEvaluation = never_pause,
    stop_requested: Callable[[], bool] = never_stop,
    resume: bool = False,
) -> RunRecord:
    """Trains one run and returns its record, which is also in its folder.

    A run that is paused (status `paused`) keeps its checkpoint and resumes in a later call. A killed run may report
    evaluations that it reported before, with the same values.

    Of several processes each calls this with the same run. The first alone writes and calls `on_evaluation`.

    A run that runs out of memory begins again with micro-batches of half the size and twice as many of them per step,
    down to one example: the batch of a step, and the training, stay the same. Of several processes the one that ran out
    of memory ends, and with it the others; the run begins again when it is started again.

    Args:
        config: The run's settings. Its model, data and precision are those of `inputs`.
        place: The folder of the run, and its arm and trial.
        inputs: Base model and data.
        on_evaluation: Takes the step and the metrics of every evaluation, and returns whether the run continues. Its
            answer has no effect at the last step, or where early stopping ends the run.
        stop_requested: Called after every step; returns whether to stop with a checkpoint (status `interrupted`).
        resume: Resumes from the folder's newest checkpoint of a run alone, if there is one.

    Raises:
        Diverged: The loss became NaN or infinite. The record says `failed`.
        OutOfMemory: It does not fit at one example per micro-batch. The record says `infeasible`.
        RanksLost: Another process is gone, or one ran out of memory. The record says `interrupted`.
    """
    too_large: list[int] = []
    while True:
        try:
            with inputs.telemetry.phase("loading"), join_processes(config.trainer) as group:
                require_same(inputs.fingerprints() if group.world_size > 1 else {})
                session = _Session(config, place, inputs, group=group)
                return session.run(on_evaluation, stop_requested, resume=resume, too_large=too_large)
        except OutOfMemory:
            record = read_run(place.folder)
            micro_batches = int(record.batching.get("micro_batches", 1))
            if group.world_size > 1 or micro_batches >= config.trainer.batch_size or not record.steps_planned:
                raise
            too_large.append(micro_batches)
        resume = False  # begin again, so that the run has one number of micro-batches and can be repeated
        # not in the handler, where the traceback holds the tensors of the attempt
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Session:
    """One training from its beginning or a checkpoint to an end or an error, on each of its processes."""

    def __init__(
        self,
        config: RunConfig,
        place: RunPlace,
        inputs: RunInputs,
        *,
        group: Fabric,
    ) -> None:
        self.config = config
        self.place = place
        self.folder = place.folder
        self.inputs = inputs
        self.group = group
        self.log: RunLog | None = None
        """Writes the run's folder; only on the first process."""

    def run(
        self,
        on_evaluation: OnEvaluation,
        stop_requested: Callable[[], bool],
        *,
        resume: bool,
        too_large: list[int],
    ) -> RunRecord:
        """Trains to an end or an error, and closes the record.

        Args:
            on_evaluation: As for `train_run`.
            stop_requested: As for `train_run`.
            resume: Whether to resume from a checkpoint.
            too_large: Micro-batches per step of the attempts that ran out of memory, in order.
        """
        record, checkpoint, start_step = on_first(self.group, lambda: self._open(resume=resume, too_large=too_large))
        end = None if checkpoint is None else end_at_evaluation(record, self.config.trainer, pauses=False)
        if end is not None:  # killed after its last evaluation, which must not be written a second time
            return on_first(self.group, lambda: self._close(*end))
        reset_peak_memory()
        callback = RunCallback(
            on_evaluation,
            stop_requested,
            run_log=self.log,
            folder=self.folder,
            config=self.config.trainer,
            averaging=None if self.config.optim.ema_decay is None else WeightAveraging(self.config.optim.ema_decay),
            start_step=start_step,
            telemetry=self.inputs.telemetry,
        )
        try:
            with memory_errors_as_ours():
                status, reason = self._train(record, callback, checkpoint=checkpoint)
        except BaseException as caught:
            micro_batches = int(record.batching["micro_batches"])
            error = explain_failure(caught, group=self.group, folder=self.folder, micro_batches=micro_batches)
            if self.log is not None:
                status = status_after(error, self.folder)
                # a paused run stays paused, whatever ends the process
                if (self.log.record.status, status) != ("paused", "interrupted"):
                    self._close(status, describe_failure(error))
            if error is caught:
                raise
            raise error from caught
        return on_first(self.group, lambda: self._close(status, reason))

    def _open(self, *, resume: bool, too_large: list[int]) -> tuple[RunRecord, Path | None, int]:
        """Opens the record and the log on the first process; returns the record, the checkpoint and its step.

        Raises:
            OutOfMemory: The last attempt had one example per micro-batch.
        """
        config, folder, inputs = self.config, self.folder, self.inputs
        did_not_fit = take_failure_note(folder) if resume else None
        if did_not_fit is not None:  # one of several processes ran out of memory, and the run was started again
            too_large = [*read_run(folder).batching.get("too_large", []), did_not_fit]
        # a checkpoint of other micro-batches would make a run that can't be repeated
        found = find_checkpoint(folder, kind="last") if resume and not too_large else FoundCheckpoint()
        record = open_record(config, self.place, inputs, found=found, num_processes=self.group.world_size)
        before = record.batching
        too_large = too_large or before.get("too_large", [])
        if too_large:
            accumulate = min(2 * too_large[-1], config.trainer.batch_size)
        elif "micro_batches" in before:  # a resumed run keeps the number with which it began
            accumulate = int(before["micro_batches"])
        else:
            accumulate = resolve_accumulate(config.trainer, inputs.splits.train)
        record.batching = describe_batching(inputs, config.trainer, accumulate=accumulate)
        if too_large:
            record.batching["too_large"] = list(too_large)
        self.log = RunLog(record, folder, start_step=found.step)
        if too_large and too_large[-1] >= config.trainer.batch_size:
            self._close("infeasible", reason := "one row per process and micro-batch does not fit")
            raise OutOfMemory(reason)
        return record, found.path, found.step

    def _close(self, status: RunStatus, reason: str | None) -> RunRecord:
        """Writes the record of the session's end on the first process, and removes checkpoints that nobody needs."""
        assert self.log is not None
        if status != "paused":  # `RunCallback` has closed a paused run, before its checkpoint
            self.log.close(status, reason)
            if status != "interrupted":
                remove_checkpoints(self.folder)
        return self.log.record

    def _train(
        self, record: RunRecord, callback: RunCallback, *, checkpoint: Path | None
    ) -> tuple[RunStatus, str | None]:
        """Trains, notes the progress in the record, and returns how the session ended and why."""
        config, inputs, settings = self.config, self.inputs, self.config.trainer
        module = TrainingModule(
            config, base=inputs.base, task=inputs.splits.task, accumulate=int(record.batching["micro_batches"])
        )
        data = DataModule(config, splits=inputs.splits, accumulate=module.accumulate)
        averaging = [] if callback.averaging is None else [callback.averaging]
        # The mean of the weights is in place when the user's callbacks see the end of an evaluation. Ours comes after
        # them, because its checkpoint keeps their state.
        callbacks = [signals := KeepSignalHandler(), *averaging, *build_callbacks(config), callback]
        status: RunStatus = "complete"
        with (
            open_loggers(config, self.folder, is_first=self.group.is_global_zero) as loggers,
            quiet_lightning(),
            deterministic_algorithms(settings.deterministic),
        ):
            trainer = self._build_trainer(module, callbacks, loggers)
            try:
                if record.steps_planned:
                    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                if callback.evaluated_step != trainer.global_step:  # the last steps did not fill an interval
                    trainer.validate(module, datamodule=data, verbose=False)
            except RunStopped:
                status = "interrupted"
            finally:
                signals.restore()
        if self.log is None:
            return status, None
        record = self.log.record
        module.progress.note_in(record)
        stopped_at = f"step {trainer.global_step} of {record.steps_planned}"
        if callback.paused:
            return "paused", record.reason
        if status == "interrupted":
            record.steps_done = trainer.global_step
            return status, f"stopped at {stopped_at}"
        if trainer.global_step < record.steps_planned and record.reason is None:
            return status, f"a callback stopped it at {stopped_at}"
        return status, record.reason

    def _build_trainer(
        self, module: TrainingModule, callbacks: list[lightning.Callback], loggers: list[Logger]
    ) -> lightning.Trainer:
        config, settings = self.config, self.config.trainer
        launch = find_launch(settings)
        show = (
            self.group.is_global_zero and settings.progress and config.method.name != "frozen" and sys.stderr.isatty()
        )
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if show and not has_bar:
            callbacks = [*callbacks, TQDMProgressBar(refresh_rate=1)]
        return lightning.Trainer(
            accelerator=resolve_device(settings),
            devices=launch.devices,
            num_nodes=launch.num_nodes,
            strategy=build_strategy(settings, launch),
            plugins=[launch.environment],
            precision="bf16-mixed" if self.inputs.needs_autocast(config) else "32-true",
            logger=loggers or False,
            profiler=build_profiler(config, self.folder),
            callbacks=callbacks,
            max_epochs=1,
            max_steps=settings.max_steps,
            val_check_interval=settings.eval_every_steps * module.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, settings.max_steps // 200),
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=show or has_bar,
            enable_model_summary=False,
            accumulate_grad_batches=module.accumulate,
            gradient_clip_val=config.optim.clip_norm,  # the module clips by itself, but DeepSpeed does it for it
            default_root_dir=self.folder,
        )
