"""Trains one run under Lightning, and writes its record."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import lightning
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger

from lorasweep.config.run import RunConfig
from lorasweep.errors import OutOfMemory
from lorasweep.methods.method import replace_parameters
from lorasweep.models.load import BaseModel
from lorasweep.record import RunRecord, RunStatus, read_run
from lorasweep.training.callbacks import OnEvaluation, RunCallback, RunStopped
from lorasweep.training.checkpoint import FoundCheckpoint, find_checkpoint, remove_checkpoints
from lorasweep.training.data_module import DataModule
from lorasweep.training.environment import deterministic_algorithms, reset_peak_memory, resolve_device
from lorasweep.training.failures import (
    choose_error_to_raise,
    convert_memory_errors,
    describe_failure,
    pop_failed_micro_batches,
    status_after,
)
from lorasweep.training.inputs import RunInputs, check_batch_memory, describe_batching
from lorasweep.training.loggers import build_callbacks, finish_loggers, start_loggers
from lorasweep.training.module import TrainingModule, prepare_model
from lorasweep.training.own_data import OwnSplits
from lorasweep.training.own_module import OwnModuleRun, build_module
from lorasweep.training.processes import (
    build_strategy,
    find_launch,
    join_processes,
    quiet_lightning,
    require_same_on_processes,
    run_on_first,
)
from lorasweep.training.run_log import RunFolder, RunLog, find_run_end, open_record
from lorasweep.training.score import score_best_weights


def never_stop() -> bool:
    return False


def train_run(
    config: RunConfig,
    run_folder: RunFolder,
    *,
    inputs: RunInputs,
    on_evaluation: OnEvaluation = lambda step, values: None,
    stop_requested: Callable[[], bool] = never_stop,
    resume: bool = False,
) -> RunRecord:
    """Trains one run and returns its record, which is also in its folder.

    If several processes train the run, each process calls this function, but only the first process writes and reports.
    A run that resumes after a kill may report evaluations again, with the same values. If memory runs out, the run
    begins again with micro-batches of half the size, down to one example. It learns the same, because the batch of a
    step stays the same.

    Args:
        config: The run's settings. `inputs` must have their model, data and precision.
        run_folder: The folder of the run, and its arm and trial.
        inputs: Base model and data.
        on_evaluation: Gets the step and the metrics of every evaluation, and returns why the run must stop, or None.
            The answer has no effect at the last step, or if early stopping ends the run.
        stop_requested: Called before the first and after every step. If it returns True, the run stops with a
            checkpoint (`interrupted`).
        resume: Whether to resume from the newest checkpoint in the folder, if there is one.

    Raises:
        Diverged: The loss became NaN or infinite. The record says `failed`.
        OutOfMemory: One example per micro-batch does not fit. The record says `infeasible`.
        RanksLost: Another process is gone, or one of several processes ran out of memory. The record says
            `interrupted`. The next call with `resume` resumes the run, or begins it with smaller micro-batches.
    """
    too_large: list[int] = []  # micro-batches per step of the attempts that ran out of memory
    while True:
        try:
            with inputs.telemetry.phase("loading"), join_processes(config.trainer) as group:
                if group.world_size > 1:
                    require_same_on_processes(inputs.fingerprints())
                session = _Session(
                    config=config,
                    run_folder=run_folder,
                    inputs=inputs,
                    group=group,
                    on_evaluation=on_evaluation,
                    stop_requested=stop_requested,
                )
                return session.run(resume=resume, too_large=too_large)
        except OutOfMemory:
            record = read_run(run_folder.path)
            micro_batches = int(record.batching.get("micro_batches", 1))
            # the loader of a user's module makes whole batches
            can_cut = config.module is None and micro_batches < config.trainer.batch_size
            if group.world_size > 1 or not can_cut or not record.steps_planned:
                raise
            too_large.append(micro_batches)
        resume = False  # a run with two different numbers of micro-batches could not be reproduced
        # Memory is freed outside of the handler: inside, the traceback still holds the tensors of the attempt.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(kw_only=True)
class _Session:
    """Trains a run once, from its beginning or a checkpoint until it ends or fails. Each process has a session."""

    config: RunConfig
    run_folder: RunFolder
    inputs: RunInputs
    group: Fabric
    on_evaluation: OnEvaluation
    stop_requested: Callable[[], bool]
    log: RunLog | None = None
    """Writes the run's folder. Only the first process has a log."""

    def run(self, *, resume: bool, too_large: list[int]) -> RunRecord:
        """Trains until the run ends or fails, and closes the record.

        `too_large` has the micro-batches per step of each earlier attempt that ran out of memory.
        """
        folder = self.run_folder.path
        record, checkpoint, start_step = run_on_first(
            self.group, lambda: self._open(resume=resume, too_large=too_large)
        )
        # killed after the last evaluation, which must not be written twice
        end = None if checkpoint is None else find_run_end(record, self.config.trainer)
        reset_peak_memory()
        callback = RunCallback(
            on_evaluation=self.on_evaluation,
            stop_requested=self.stop_requested,
            folder=folder,
            config=self.config.trainer,
            telemetry=self.inputs.telemetry,
            run_log=self.log,
            logged_step=start_step,
        )
        try:
            with convert_memory_errors():
                status, reason = end or self._train(record, callback, checkpoint=checkpoint)
                run_on_first(self.group, lambda: self._score_best_weights(status))
        except BaseException as caught:
            micro_batches = int(record.batching["micro_batches"])
            error = choose_error_to_raise(caught, group=self.group, folder=folder, micro_batches=micro_batches)
            if self.log is not None:
                self._close(status_after(error, folder), describe_failure(error))
            if error is caught:
                raise
            raise error from caught
        return run_on_first(self.group, lambda: self._close(status, reason))

    def _open(self, *, resume: bool, too_large: list[int]) -> tuple[RunRecord, Path | None, int]:
        """Opens record and log on the first process. Returns the record, the checkpoint to resume from and its step."""
        config, folder, inputs = self.config, self.run_folder.path, self.inputs
        did_not_fit = pop_failed_micro_batches(folder) if resume else None
        if did_not_fit is not None:  # one of several processes ran out of memory in the last attempt
            too_large = [*read_run(folder).batching.get("too_large", []), did_not_fit]
        # An attempt with more micro-batches begins at step 0: a run with two different numbers can't be reproduced.
        found = find_checkpoint(folder, kind="last") if resume and not too_large else FoundCheckpoint()
        record = open_record(config, self.run_folder, inputs, found=found, num_processes=self.group.world_size)
        earlier_batching = record.batching
        too_large = too_large or earlier_batching.get("too_large", [])
        if too_large:
            accumulate = min(2 * too_large[-1], config.trainer.batch_size)
        elif "micro_batches" in earlier_batching:  # a resumed run keeps its number
            accumulate = int(earlier_batching["micro_batches"])
        else:
            check_batch_memory(config.trainer, inputs.splits.train)
            accumulate = config.trainer.accumulate
        record.batching = describe_batching(inputs, config.trainer, accumulate=accumulate)
        if too_large:
            record.batching["too_large"] = list(too_large)
        self.log = RunLog(record, folder, start_step=found.step)
        if too_large and too_large[-1] >= config.trainer.batch_size:
            self._close("infeasible", reason := "one row per process and micro-batch does not fit")
            raise OutOfMemory(reason)
        return record, found.path, found.step

    def _score_best_weights(self, status: RunStatus) -> None:
        if self.log is not None and status == "complete":
            score_best_weights(self.config, self.log.record, self.run_folder.path, inputs=self.inputs)
            self.inputs.base.model.cpu()  # shared with later runs, whose initial values are drawn on the CPU

    def _close(self, status: RunStatus, reason: str | None) -> RunRecord:
        """Writes the final record and removes the checkpoints, unless the run can resume from them."""
        assert self.log is not None
        self.log.close(status, reason)
        if status != "interrupted":
            remove_checkpoints(self.run_folder.path)
        return self.log.record

    def _train(
        self, record: RunRecord, callback: RunCallback, *, checkpoint: Path | None
    ) -> tuple[RunStatus, str | None]:
        """Trains, writes the progress into the record, and returns the run's status and its reason."""
        config, inputs = self.config, self.inputs
        accumulate = int(record.batching["micro_batches"])
        module: lightning.LightningModule
        data: lightning.LightningDataModule
        # At the end of an evaluation Lightning calls them in this order. The user's callbacks come first, because our
        # checkpoint keeps their state.
        callbacks = [*build_callbacks(config), callback]
        if isinstance(inputs.splits, OwnSplits):
            run = OwnModuleRun(config, inputs.base, module=_prepare_own_module(config, inputs.base))
            module, data = run.module, inputs.splits.seed_loaders(config.seeds.data_order)
            callbacks.insert(-1, run)  # before `callback`, which reads its values
            callback.run = run
        else:
            module = callback.run = TrainingModule(config, inputs=inputs, accumulate=accumulate)
            data = DataModule(config, splits=inputs.splits, accumulate=accumulate)
        loggers = start_loggers(config, self.run_folder.path, is_first_process=self.group.is_global_zero)
        status: RunStatus = "complete"
        try:
            with quiet_lightning(), deterministic_algorithms(config.trainer.deterministic):
                trainer = self._build_trainer(accumulate, callbacks, loggers)
                try:
                    if record.steps_planned:
                        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                    # Lightning evaluates every `trainer.eval_every_steps`, so the last steps may lack an evaluation.
                    if callback.evaluated_step != trainer.global_step:
                        trainer.validate(module, datamodule=data, verbose=False)
                finally:
                    _free_training_memory(trainer, module)
        except RunStopped:
            status = "interrupted"
        finally:
            finish_loggers(loggers if self.group.is_global_zero else [])
        if self.log is None:
            return status, None
        record = self.log.record
        callback.run.progress.write_to(record)
        progress = f"step {trainer.global_step} of {record.steps_planned}"
        if status == "interrupted":
            record.steps_done = trainer.global_step
            return status, f"stopped at {progress}"
        if callback.end is not None:
            return callback.end
        if trainer.global_step < record.steps_planned:
            return status, f"a callback stopped it at {progress}"
        return status, None

    def _build_trainer(
        self, accumulate: int, callbacks: list[lightning.Callback], loggers: list[Logger]
    ) -> lightning.Trainer:
        config, settings = self.config, self.config.trainer
        launch = find_launch(settings)
        steps_between_logs = max(1, settings.max_steps // 200)
        shows_progress = (
            self.group.is_global_zero and settings.progress and config.method.name != "frozen" and sys.stderr.isatty()
        )
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if shows_progress and not has_bar:
            # each refresh reads the loss, and so waits for a GPU
            callbacks = [*callbacks, TQDMProgressBar(refresh_rate=steps_between_logs * accumulate)]
        trainer = lightning.Trainer(
            accelerator=resolve_device(settings),
            devices=launch.devices,
            num_nodes=launch.num_nodes,
            strategy=build_strategy(settings, launch),
            plugins=[launch.environment],
            precision=self.inputs.lightning_precision(config),
            logger=loggers or False,
            callbacks=callbacks,
            max_epochs=1 if config.module is None else -1,  # our own data is one epoch
            max_steps=settings.max_steps,
            val_check_interval=settings.eval_every_steps * accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=steps_between_logs,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=shows_progress or has_bar,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=config.optim.clip_norm,  # the module clips by itself, except under DeepSpeed
            default_root_dir=self.run_folder.path,
        )
        # Lightning's SIGTERM handler sends a message to the other processes, whatever they are doing, and raises in the
        # middle of a step. So it must not replace the handler of this process.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer


def _prepare_own_module(config: RunConfig, base: BaseModel) -> lightning.LightningModule:
    """Returns the user's module with the run's arguments, the base's weights, and what the method changes."""
    module = build_module(config)
    shared = zip(module.parameters(), base.model.parameters(), strict=True)
    replace_parameters(module, dict(shared))
    prepared = prepare_model(config, replace(base, model=module))
    assert isinstance(prepared, lightning.LightningModule)
    return prepared


def _free_training_memory(trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
    """Drops the model and the optimizer of a run that has ended.

    Lightning's objects refer to each other in cycles. Without this, weights, gradients and moments of many runs would
    stay in memory until Python's next full garbage collection.
    """
    module._modules.clear()
    trainer.strategy.optimizers = []
    trainer.strategy.lr_scheduler_configs = []
