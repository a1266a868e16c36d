"""One run: composes base model, data, method, LightningModule and Trainer, and keeps the record of what happened."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lorasweep.config.run import RunConfig
from lorasweep.disk import why_unwritable
from lorasweep.errors import OutOfMemory, WorkerError, first_line
from lorasweep.record import RunRecord, RunStatus, read_run
from lorasweep.training.averaging import PutBack, WeightAveraging
from lorasweep.training.batches import resolve_accumulate
from lorasweep.training.callbacks import (
    Checkpointing,
    GoesOn,
    KeepSignalHandler,
    Logging,
    RunStopped,
    Settling,
    Stopping,
    go_on,
    note_progress,
)
from lorasweep.training.checkpoint import Found, find_checkpoint
from lorasweep.training.components import build_callbacks, build_profiler, open_loggers, writes_checkpoints
from lorasweep.training.data_module import DataModule
from lorasweep.training.environment import deterministic_algorithms, reset_peak_memory, resolve_device
from lorasweep.training.inputs import RunInputs, describe_batching
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
from lorasweep.training.run_log import (
    RunLog,
    RunPlace,
    describe_failure,
    describe_stale,
    is_out_of_memory,
    is_stale,
    new_record,
    reopen_record,
)


def never_stop() -> bool:
    """The `stop_requested` of a run that nothing interrupts."""
    return False


def train_run(
    config: RunConfig,
    place: RunPlace,
    *,
    inputs: RunInputs,
    on_evaluation: GoesOn = go_on,
    stop_requested: Callable[[], bool] = never_stop,
    resume: bool = False,
) -> RunRecord:
    """Trains one run and returns its record, which is also in its folder.

    A run that is paused (status `paused`) keeps its checkpoint and resumes in a later call. A killed run may report
    evaluations that it reported before, with the same values.

    Of several processes each calls this with the same run. The first alone writes and asks `on_evaluation`.

    A run that runs out of memory begins again with micro-batches of half the rows and twice as many of them per step,
    down to one row: the batch of a step, and what is learned, stay the same. Of several processes the one that ran out
    of memory ends, and with it the others; the run begins again when it is started again.

    Args:
        config: The run's settings. Its model, data and precision are those of `inputs`.
        place: Where it writes.
        inputs: Base model and data.
        on_evaluation: Takes the step and the metrics of every evaluation, and returns whether the run goes on. What it
            returns at the last step, or where early stopping ends the run, has no effect.
        stop_requested: Asked after every step whether to stop with a checkpoint (status `interrupted`).
        resume: Resumes from the folder's newest checkpoint of a run alone, where there is one.

    Raises:
        Diverged: The loss became NaN or infinite. The record says `failed`.
        OutOfMemory: It does not fit at one row per micro-batch. The record says `infeasible`.
        RanksLost: Another process is gone, or one ran out of memory. The record says `interrupted`.
    """
    too_large: list[int] = []
    while True:
        try:
            with inputs.telemetry.phase("loading"), join_processes(config.trainer) as group:
                require_same(inputs.fingerprints() if group.world_size > 1 else {})
                session = _Session(config, place, inputs, group)
                return session.run(on_evaluation, stop_requested, resume=resume, too_large=too_large)
        except OutOfMemory:
            used = read_run(place.folder)
            micro_batches = int(used.batching.get("micro_batches", 1))
            if group.world_size > 1 or micro_batches >= config.trainer.batch_size or not used.steps_planned:
                raise
            too_large.append(micro_batches)
        resume = False  # from the beginning: micro-batches of one size throughout, as a run that is repeated has
        free_memory()  # outside of the handler, whose traceback holds the tensors


@contextmanager
def _out_of_memory_as_such() -> Iterator[None]:
    """Raises what says that memory ran out, in one of its many ways, as `OutOfMemory`."""
    try:
        yield
    except BaseException as error:
        if is_out_of_memory(error):
            raise OutOfMemory(first_line(error)) from error
        raise


@dataclass(frozen=True, eq=False)
class _Session:
    """One training from a start or a checkpoint to an end or an error, on each of its processes."""

    config: RunConfig
    place: RunPlace
    inputs: RunInputs
    group: Fabric

    def run(
        self, on_evaluation: GoesOn, stop_requested: Callable[[], bool], *, resume: bool, too_large: list[int]
    ) -> RunRecord:
        """Trains to the end, a stop or an error, and closes the record. `too_large`: micro-batches that did not fit."""
        folder, logs = self.place.folder, list[RunLog]()

        def begin() -> tuple[RunRecord, Path | None, int]:
            record, checkpoint, start_step = self._open_record(resume=resume, too_large=too_large)
            logs.append(RunLog(record, folder, start_step=start_step))
            if record.batching.get("too_large", [0])[-1] >= self.config.trainer.batch_size:
                logs[0].close("infeasible", reason := "one row per process and micro-batch does not fit")
                raise OutOfMemory(reason)
            return record, checkpoint, start_step

        record, checkpoint, start_step = on_first(self.group, begin)
        log = logs[0] if logs else None
        stale = checkpoint is not None and is_stale(record, self.config.trainer)
        if stale or (checkpoint is not None and record.last.get("step") == record.steps_planned):
            # killed after its last evaluation, which must not be written a second time
            status: RunStatus = "complete"
            record.reason = describe_stale(record) if stale else None
        else:
            reset_peak_memory()
            try:
                with _out_of_memory_as_such():
                    status = self._train(
                        record, log, on_evaluation, stop_requested, start_step=start_step, checkpoint=checkpoint
                    )
            except BaseException as caught:
                micro_batches = int(record.batching["micro_batches"])
                error = explain_failure(caught, group=self.group, folder=folder, micro_batches=micro_batches)
                if log is not None:
                    status = status_after(error, folder)
                    # a paused run stays paused, whatever ends the process
                    if (record.status, status) != ("paused", "interrupted"):
                        log.close(status, describe_failure(error))
                if error is caught:
                    raise
                raise error from caught

        def end() -> RunRecord:
            assert log is not None
            if status != "paused":  # which `Settling` closed before the checkpoint
                log.close(status, log.record.reason)
            return log.record

        return on_first(self.group, end)

    def _open_record(self, *, resume: bool, too_large: list[int]) -> tuple[RunRecord, Path | None, int]:
        """Returns a run's record, and the checkpoint and the step from which it goes on."""
        config, folder, inputs = self.config, self.place.folder, self.inputs
        did_not_fit = take_failure_note(folder) if resume else None
        if did_not_fit is not None:
            too_large = [*read_run(folder).batching.get("too_large", []), did_not_fit]
        found = find_checkpoint(folder, kind="last") if resume and not too_large else Found()
        if found.path is not None:
            record = reopen_record(folder, step=found.step, notes=found.notes)
        else:
            record = new_record(config, self.place, inputs, num_processes=self.group.world_size, notes=found.notes)
        too_large = too_large or record.batching.get("too_large", [])
        accumulate = (
            min(2 * too_large[-1], config.trainer.batch_size)
            if too_large
            else resolve_accumulate(config.trainer, inputs.splits.train, begun=record)
        )
        record.batching = describe_batching(inputs, config.trainer, accumulate=accumulate, padding_fraction=0.0)
        if too_large:
            record.batching["too_large"] = list(too_large)
        return record, found.path, found.step

    def _train(
        self,
        record: RunRecord,
        log: RunLog | None,
        on_evaluation: GoesOn,
        stop_requested: Callable[[], bool],
        *,
        start_step: int,
        checkpoint: Path | None,
    ) -> RunStatus:
        """Trains, fills the record, and returns how the session ended."""
        config, inputs, settings = self.config, self.inputs, self.config.trainer
        module = TrainingModule(
            config, base=inputs.base, task=inputs.splits.task, accumulate=int(record.batching["micro_batches"])
        )
        data = DataModule(config, splits=inputs.splits, accumulate=module.accumulate)
        averaging = [] if config.optim.ema_decay is None else [WeightAveraging(config.optim.ema_decay)]
        folder, every = self.place.folder, settings.eval_every_steps
        callbacks = [
            keeping := KeepSignalHandler(),
            *averaging,
            *build_callbacks(config),  # before `Checkpointing`, which keeps what they know of this evaluation
            logging := Logging(log, start_step=start_step, telemetry=inputs.telemetry),
            settling := Settling(on_evaluation, run_log=log, config=settings),
            Checkpointing(folder),
            *map(PutBack, averaging),
            Stopping(stop_requested, folder, eval_every_steps=every, logging=logging),
        ]
        status: RunStatus = "complete"
        with (
            open_loggers(config, folder, is_first=self.group.is_global_zero) as loggers,
            quiet_lightning(),
            deterministic_algorithms(settings.deterministic),
        ):
            trainer = self._build_trainer(module, callbacks, loggers)
            try:
                if record.steps_planned:
                    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
                if logging.evaluated_step != trainer.global_step:  # the last steps did not fill an interval
                    trainer.validate(module, datamodule=data, verbose=False)
            except RunStopped:
                status = "interrupted"
            finally:
                keeping.put_back()
        if log is not None:
            note_progress(log.record, module)
            stopped_at = f"step {trainer.global_step} of {record.steps_planned}"
            if status == "interrupted":
                log.record.steps_done = trainer.global_step
                log.record.reason = f"stopped at {stopped_at}"
            elif trainer.global_step < record.steps_planned and log.record.reason is None:
                log.record.reason = f"a callback stopped it at {stopped_at}"
        return "paused" if settling.paused else status

    def _build_trainer(
        self, module: TrainingModule, callbacks: list[lightning.Callback], loggers: list[Logger]
    ) -> lightning.Trainer:
        config, settings, folder = self.config, self.config.trainer, self.place.folder
        launch = find_launch(settings)
        mixed = self.inputs.precision == "bf16" and module.method.needs_autocast
        if launch.size == 1:  # Lightning takes it from variables of srun, where this process may be no rank
            setattr(rank_zero_only, "rank", 0)  # noqa: B010
        show = (
            self.group.is_global_zero and settings.progress and config.method.name != "frozen" and sys.stderr.isatty()
        )
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if show and not has_bar:
            callbacks = [*callbacks, TQDMProgressBar(refresh_rate=1)]
        with quiet_lightning():
            return lightning.Trainer(
                accelerator=resolve_device(settings),
                devices=launch.devices,
                num_nodes=launch.num_nodes,
                strategy=build_strategy(settings, launch),
                plugins=[launch.environment],
                precision="bf16-mixed" if mixed else "32-true",
                logger=loggers or False,
                profiler=build_profiler(config, folder),
                callbacks=callbacks,
                max_epochs=1,
                max_steps=settings.max_steps,
                val_check_interval=settings.eval_every_steps * module.accumulate,
                check_val_every_n_epoch=None,
                num_sanity_val_steps=0,
                log_every_n_steps=max(1, settings.max_steps // 200),
                enable_checkpointing=writes_checkpoints(callbacks),
                enable_progress_bar=show or has_bar,
                enable_model_summary=False,
                accumulate_grad_batches=module.accumulate,
                gradient_clip_val=config.optim.clip_norm,  # the module clips by itself, but DeepSpeed does it for it
                default_root_dir=folder,
            )


def status_after(error: BaseException, folder: Path) -> RunStatus:
    """Returns how a run ended by an error: what is not the run's fault leaves its checkpoint to go on from."""
    if isinstance(error, OutOfMemory):
        return "infeasible"
    is_own = isinstance(error, Exception) and not isinstance(error, WorkerError)
    is_own = is_own and why_unwritable(folder, error) is None
    return "failed" if is_own else "interrupted"


def free_memory() -> None:
    """Returns to the system, or the device, what a run that failed has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
