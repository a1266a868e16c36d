"""Trains one run under Lightning, and writes its record."""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn

from lorasweep.config.run import RunConfig
from lorasweep.disk import write_atomically
from lorasweep.errors import Diverged, OutOfMemory
from lorasweep.methods import bind
from lorasweep.record import RunRecord, RunStatus, read_run
from lorasweep.training.checkpoint import (
    RUN_CHECKPOINT,
    DirectCheckpointIO,
    get_step,
    read_checkpoint,
)
from lorasweep.training.data_module import DataModule
from lorasweep.training.environment import deterministic_algorithms, resolve_device
from lorasweep.training.finished_run import score_best_weights
from lorasweep.training.loggers import build_callbacks, start_loggers
from lorasweep.training.memory import convert_memory_errors, reset_peak_memory
from lorasweep.training.module import TrainingModule
from lorasweep.training.open_run import Metrics, OpenRun, RunFolder, find_run_end
from lorasweep.training.own_module import OwnModuleRun
from lorasweep.training.processes import (
    build_strategy,
    convert_lost_process,
    find_launch,
    join_processes,
    quiet_lightning,
    run_on_first,
)
from lorasweep.training.progress import OnPhase, Phase, ignore_phase
from lorasweep.training.run_inputs import RunInputs

OnEvaluation = Callable[[int, Metrics], str | None]
"""`on_evaluation(step, metrics)` gets all metrics of an evaluation. Returns why the run must stop, or None."""


def never_stop() -> bool:
    return False


def train_alone(
    config: RunConfig,
    run_folder: RunFolder,
    *,
    inputs: RunInputs,
    on_evaluation: OnEvaluation = lambda step, values: None,
    stop_requested: Callable[[], bool] = never_stop,
    on_phase: OnPhase = ignore_phase,
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
        on_phase: Called when a phase begins, on every process.
        resume: Whether to resume from the newest checkpoint in the folder, if there is one.

    Raises:
        Diverged: The loss became NaN or infinite. The record says `failed`.
        OutOfMemory: One example per micro-batch does not fit, or memory ran out in one of several processes. The record
            says `infeasible`.
        RanksLost: Another process is gone. The record says `interrupted`, and the next call with `resume` resumes.
    """
    too_large: list[int] = []  # micro-batches per step of the attempts that ran out of memory
    while True:
        try:
            with join_processes(config.trainer) as group:
                attempt = LightningRun(
                    config=config,
                    run_folder=run_folder,
                    inputs=inputs,
                    group=group,
                    on_evaluation=on_evaluation,
                    stop_requested=stop_requested,
                    on_phase=on_phase,
                )
                return attempt.run(resume=resume, too_large=too_large)
        except OutOfMemory as error:
            if group.world_size > 1:  # the other processes are in a step, so they can't agree on smaller micro-batches
                raise OutOfMemory(
                    f"a run of several processes must fit in memory, but {error}. Start it again with a larger "
                    "`trainer.accumulate`."
                ) from error
            record = read_run(run_folder.path)
            micro_batches = int(record.batching.get("micro_batches", 1))
            can_cut = config.module is None and micro_batches < config.trainer.batch_size
            if not can_cut or not record.steps_planned:
                raise
            too_large.append(micro_batches)
        resume = False  # a run with two different numbers of micro-batches could not be reproduced
        # Memory is freed outside of the handler: inside, the traceback still holds the tensors of the attempt.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class RunStopped(BaseException):
    """Leaves Lightning's training loop immediately. `trainer.should_stop` would first run an evaluation."""


@dataclass(kw_only=True, eq=False)
class LightningRun(lightning.Callback):
    """Trains a run once, from its beginning or a checkpoint until it ends or fails.

    It is a callback of its own Trainer: it writes the run's folder, reports evaluations, and stops the training on
    request. If several processes train the run, each has such an object. Only the first process writes and reports, and
    the others follow its decision.
    """

    config: RunConfig
    run_folder: RunFolder
    inputs: RunInputs
    group: Fabric
    on_evaluation: OnEvaluation
    stop_requested: Callable[[], bool]
    on_phase: OnPhase
    opened: OpenRun | None = None
    """The run's folder. Only the first process has it."""
    training: TrainingModule | OwnModuleRun = field(init=False)
    """The LightningModule that trains. It has the progress and the losses of the last step."""
    logged_step: int = 0
    """Last logged step. Initially the step at which the training begins or resumes."""
    lr: float = 0.0
    """Learning rate of the last step."""
    has_begun: bool = False
    """Whether this process has prepared the first batch."""
    evaluated_step: int = -1
    """Step of the last evaluation."""
    end: tuple[RunStatus, str | None] | None = None
    """The status and reason of a run that ends before its last step."""

    def run(self, *, resume: bool, too_large: list[int]) -> RunRecord:
        """Trains until the run ends or fails, and closes the record.

        `too_large` has the micro-batches per step of each earlier attempt that ran out of memory.
        """
        record, checkpoint, self.logged_step = run_on_first(
            self.group, lambda: self._open(resume=resume, too_large=too_large)
        )
        # killed after the last evaluation, which must not be written twice
        end = None if checkpoint is None else find_run_end(record, self.config.trainer)
        reset_peak_memory()
        try:
            with convert_memory_errors():
                status, reason = end or self._train(record, checkpoint=checkpoint)
                run_on_first(self.group, lambda: self._score_best_weights(status))
        except BaseException as caught:
            error = convert_lost_process(caught, num_processes=self.group.world_size)
            if self.opened is not None:
                self.opened.close_after(error)
            if error is caught:
                raise
            raise error from caught
        return run_on_first(self.group, lambda: self._close(status, reason))

    def _open(self, *, resume: bool, too_large: list[int]) -> tuple[RunRecord, Path | None, int]:
        """Opens the run on the first process. Returns the record, the checkpoint to resume from and its step."""
        config, file, inputs = self.config, self.run_folder.path / RUN_CHECKPOINT, self.inputs
        # An attempt with more micro-batches begins at step 0: a run with two different numbers can't be reproduced.
        state = read_checkpoint(file) if resume and not too_large else {}
        processes = self.group.world_size
        self.opened = OpenRun(
            config, self.run_folder, inputs, state=state, num_processes=processes, too_large=too_large
        )
        return self.opened.record, file if state else None, get_step(state)

    def _score_best_weights(self, status: RunStatus) -> None:
        if self.opened is not None and status == "complete":
            score_best_weights(self.opened)
            self.inputs.base.model.cpu()  # shared with later runs, whose initial values are drawn on the CPU

    def _close(self, status: RunStatus, reason: str | None) -> RunRecord:
        assert self.opened is not None
        return self.opened.close(status, reason)

    def _train(self, record: RunRecord, *, checkpoint: Path | None) -> tuple[RunStatus, str | None]:
        config, inputs = self.config, self.inputs
        accumulate = int(record.batching["micro_batches"])
        # At the end of an evaluation Lightning calls them in this order. The user's callbacks come first, because our
        # checkpoint keeps their state. This object comes last, because it reads values of the others.
        callbacks = build_callbacks(config)
        module: lightning.LightningModule
        data: lightning.LightningDataModule
        if config.module is None:
            self.training = module = TrainingModule(config, inputs=inputs, accumulate=accumulate)
            data = DataModule(config, splits=inputs.data, accumulate=accumulate)
        else:
            self.training = own = OwnModuleRun(config, inputs)
            module, data, callbacks = own.module, own.data, [*callbacks, own]
        if self.opened is not None:
            loggers = self.opened.start_loggers()
        else:  # Lightning needs loggers on every process
            loggers = start_loggers(config, self.run_folder.path, is_first_process=False)
        status: RunStatus = "complete"
        try:
            with quiet_lightning(), deterministic_algorithms(config.trainer.deterministic):
                trainer = self._build_trainer(accumulate, [*callbacks, self], loggers)
                try:
                    if record.steps_planned:
                        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                    # Lightning evaluates every `trainer.eval_every_steps`, so the last steps may lack an evaluation.
                    if self.evaluated_step != trainer.global_step:
                        trainer.validate(module, datamodule=data, verbose=False)
                finally:
                    # Lightning's objects refer to each other in cycles. Without this, weights, gradients and moments of
                    # many runs would stay in memory until Python's next full garbage collection.
                    module._modules.clear()
                    trainer.strategy.optimizers = []
                    trainer.strategy.lr_scheduler_configs = []
        except RunStopped:
            status = "interrupted"
        progress = f"step {trainer.global_step} of {record.steps_planned}"
        if status == "interrupted":
            if self.opened is not None:
                self.opened.record.steps_done = trainer.global_step
            return status, f"stopped at {progress}"
        if self.end is not None:
            return self.end
        is_last = trainer.global_step >= record.steps_planned
        return status, None if is_last else f"a callback stopped it at {progress}"

    def _build_trainer(
        self, accumulate: int, callbacks: list[lightning.Callback], loggers: list[Logger]
    ) -> lightning.Trainer:
        config, settings = self.config, self.config.trainer
        launch = find_launch(settings)
        steps_between_logs = max(1, settings.max_steps // 200)
        shows_progress = (
            self.group.is_global_zero and settings.progress and not config.method.trains_nothing and sys.stderr.isatty()
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
            plugins=[launch.environment, *([] if settings.is_sharded else [DirectCheckpointIO()])],
            precision=self.inputs.lightning_precision(config),
            logger=loggers or False,
            callbacks=callbacks,
            max_epochs=1 if config.module is None else -1,  # our data module has the whole run in one epoch
            max_steps=settings.max_steps,
            val_check_interval=settings.eval_every_steps * accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=steps_between_logs,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=shows_progress or has_bar,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=config.optim.clip_norm,
            default_root_dir=self.run_folder.path,
        )
        # Lightning's SIGTERM handler sends a message to the other processes, whatever they are doing, and raises in the
        # middle of a step. So it must not replace the handler of this process.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.opened is not None:
            self.opened.progress = self.training.progress
            self.opened.note_trained(sum(p.numel() for p in pl_module.parameters() if p.requires_grad))

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin_phase("training", trainer)
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
            if self.opened is not None:
                self.opened.note_step(step, self.training.step_losses, self.lr)
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # A run can't stop between a step and its evaluation: a resumed run assumes that a checkpoint of this step was
        # written after the evaluation. `on_validation_end` then checks for the stop request.
        if ends_step and step % self.config.trainer.eval_every_steps and self._should_stop(trainer):
            run_on_first(trainer.strategy, self._flush)
            self._begin_phase("saving", trainer)
            self._save_checkpoint(trainer)
            raise RunStopped

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        run_on_first(trainer.strategy, self._flush)
        self._begin_phase("evaluating", trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes and reports the evaluation, and stops if the run ends or is asked to stop."""
        self._begin_phase("saving", trainer)
        self.evaluated_step = trainer.global_step
        step, metrics, whole_model = trainer.global_step, self.training.get_metrics(), self.training.whole_model()

        def write_and_report() -> tuple[RunStatus, str | None] | None:
            assert self.opened is not None
            save = functools.partial(bind(self.config.method).save, whole_model, base=self.inputs.base)
            self.opened.write_evaluation(step, metrics, save=save)
            stop_reason = self.on_evaluation(step, metrics)
            record = self.opened.record
            # Lightning ends after the last step by itself
            is_last = record.steps_done >= record.steps_planned
            return None if is_last else find_run_end(record, self.config.trainer, stop_reason=stop_reason)

        # In this order, a run that is killed between two of these actions repeats at most one interval.
        # 1. The rows, the kept weights and the record.
        # 2. The report. A run that is killed after it repeats the interval and reports the same values again, because
        #    this step has no checkpoint yet. So a run that must stop gets none: it would resume beyond its end.
        self.end = run_on_first(trainer.strategy, write_and_report)
        if self.end is not None:
            trainer.should_stop = True
        # 3. The checkpoint, from which the run resumes without reporting this evaluation again.
        elif trainer.state.fn == TrainerFn.FITTING:
            self._save_checkpoint(trainer)
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
        """Waits for the device, and writes the steps since the last flush on the first process."""
        progress = self.training.progress
        began = time.perf_counter()
        self.training.step_losses.cpu()  # waits for the device, which still counts as training
        progress.train_s += time.perf_counter() - began
        if self.opened is not None:
            self.opened.flush()

    def _begin_phase(self, phase: Phase, trainer: lightning.Trainer) -> None:
        self.on_phase(phase, trainer.global_step, self.config.num_steps)

    def _should_stop(self, trainer: lightning.Trainer) -> bool:
        """Returns whether any process was asked to stop. Every process must call it at the same step."""
        return bool(trainer.strategy.reduce_boolean_decision(self.stop_requested(), all=False))

    def _save_checkpoint(self, trainer: lightning.Trainer) -> None:
        """Writes Lightning's checkpoint of the trained parameters. Every process takes part, and the first writes."""
        path = self.run_folder.path / RUN_CHECKPOINT
        if trainer.is_global_zero:
            write_atomically(path, trainer.save_checkpoint)
        else:
            trainer.save_checkpoint(path)
