"""Trains runs under Lightning, one alone or several in the slots of a pack, from their first step to their last.

A pack starts and ends together. If a run diverges or is stopped at an evaluation, the others go on as a smaller pack,
from the checkpoint of this evaluation.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger

from lorasweep.config.run import RunConfig
from lorasweep.errors import Diverged, OutOfMemory, RecordError
from lorasweep.methods import bind
from lorasweep.record import RunRecord
from lorasweep.training.checkpoint import (
    RUN_CHECKPOINT,
    get_step,
    read_checkpoint,
    select_runs,
    write_checkpoint,
)
from lorasweep.training.data_module import DataModule
from lorasweep.training.environment import deterministic_algorithms, resolve_device
from lorasweep.training.finished_run import score_best_weights
from lorasweep.training.loggers import build_callbacks, finish_loggers, start_loggers
from lorasweep.training.memory import convert_memory_errors, reset_peak_memory
from lorasweep.training.module import TrainingModule
from lorasweep.training.open_run import OpenRun, RunFolder, RunRequest
from lorasweep.training.own_module import OwnModuleRun
from lorasweep.training.processes import (
    build_strategy,
    convert_lost_process,
    find_launch,
    join_processes,
    quiet_lightning,
    run_on_first,
)
from lorasweep.training.progress import OnPhase, ignore_phase
from lorasweep.training.run_inputs import RunInputs
from lorasweep.training.run_writer import OnEvaluation, RunEnd, RunStopped, RunWriter

OnEnd = Callable[[Any, RunRecord | Diverged], None]
"""Called when a run ended or was interrupted, with its request, and with its record or the error."""


def never_stop() -> bool:
    return False


def train_runs(
    requests: Sequence[RunRequest],
    *,
    inputs: RunInputs,
    checkpoint_file: Path,
    on_evaluation: OnEvaluation,
    on_end: OnEnd,
    stop_requested: Callable[[], bool] = never_stop,
    on_phase: OnPhase = ignore_phase,
) -> bool:
    """Trains runs together, each in its slot, and returns whether all have ended; False if they were stopped before.

    If several processes train the runs, each process calls this function, but only the first process writes and
    reports. If `checkpoint_file` exists, the runs resume from it. Runs that resume after a kill may report evaluations
    again, with the same values. If memory runs out for one run, it begins again with micro-batches of half the size,
    down to one example. It learns the same, because the batch of a step stays the same.

    Args:
        requests: The runs. They have the same model, data and trainer settings. Several must have `method=lora`.
        inputs: Base model and data.
        checkpoint_file: The checkpoint, which may also have further runs. It is removed when all runs have ended.
        on_evaluation: Called with the evaluations of all runs. A run that is complete ends as complete in any case.
        on_end: Called when a run ended or was interrupted.
        stop_requested: Called before the first and after every step. Returns whether to stop.
        on_phase: Called when a phase begins.

    Raises:
        OutOfMemory: The runs do not fit, one alone not even with one example per micro-batch; or memory ran out in one
            of several processes. Several runs can resume from the checkpoint in smaller packs.
        RanksLost: Another process is gone. The next call resumes.
    """
    training = _Training(
        pending=sorted(requests, key=lambda request: _find_rank(request.config)),
        inputs=inputs,
        checkpoint_file=checkpoint_file,
        on_evaluation=on_evaluation,
        on_end=on_end,
        stop_requested=stop_requested,
        on_phase=on_phase,
    )
    reset_peak_memory()
    while training.pending and not training.is_stopped:
        try:
            training.train()
        except OutOfMemory as error:
            training.cut_micro_batches(error)
        # Memory is freed outside of the handler: inside, the traceback still holds the tensors of the attempt.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return not training.is_stopped


def train_alone(
    config: RunConfig,
    run_folder: RunFolder,
    *,
    inputs: RunInputs,
    on_evaluation: OnEvaluation = lambda evaluations: [None] * len(evaluations),
    stop_requested: Callable[[], bool] = never_stop,
    on_phase: OnPhase = ignore_phase,
    resume: bool = False,
) -> RunRecord:
    """Trains one run and returns its record, which is also in its folder. Arguments and errors as in `train_runs`.

    `resume` says whether to resume from the checkpoint in the folder, if there is one.

    Raises:
        Diverged: The loss became NaN or infinite. The record says `failed`.
    """
    file, outcomes = run_folder.path / RUN_CHECKPOINT, []
    if not resume:
        file.unlink(missing_ok=True)
    train_runs(
        [RunRequest(config=config, run_folder=run_folder)],
        inputs=inputs,
        checkpoint_file=file,
        on_evaluation=on_evaluation,
        on_end=lambda _, outcome: outcomes.append(outcome),
        stop_requested=stop_requested,
        on_phase=on_phase,
    )
    [outcome] = outcomes
    if isinstance(outcome, Diverged):
        raise outcome
    return outcome


@dataclass(kw_only=True, eq=False)
class _Training:
    """The runs that have not ended, and how to train them. `train_runs` describes the arguments."""

    pending: list[RunRequest]
    inputs: RunInputs
    checkpoint_file: Path
    on_evaluation: OnEvaluation
    on_end: OnEnd
    stop_requested: Callable[[], bool]
    on_phase: OnPhase
    is_stopped: bool = False
    opened: dict[Path, OpenRun] = field(default_factory=dict)
    """The runs' folders. Only the first process has them."""
    too_large: list[int] = field(default_factory=list)
    """Micro-batches per step of the attempts of a run alone that ran out of memory."""
    num_processes: int = 1

    @property
    def config(self) -> RunConfig:
        """The settings of the first run, whose model, data and trainer are those of all."""
        return self.pending[0].config

    def train(self) -> None:
        """Trains the pending runs until one of them ends, and closes those that ended."""
        with join_processes(self.config.trainer) as group:
            self.num_processes = group.world_size
            try:
                with convert_memory_errors():
                    ends = self._train(group)
                    self._close(group, ends)
            except BaseException as caught:
                error = convert_lost_process(caught, num_processes=group.world_size)
                self._give_up(error)
                if error is caught:
                    raise
                raise error from caught
            finally:
                self.inputs.base.model.cpu()  # shared with later runs, whose initial values are drawn on the CPU

    def cut_micro_batches(self, error: OutOfMemory) -> None:
        """Lets a run begin again with smaller micro-batches. Raises OutOfMemory if that can't help."""
        # the other processes are in a step, so they can't agree on smaller micro-batches
        if self.num_processes > 1 and len(self.pending) == 1:
            raise OutOfMemory(
                f"a run of several processes must fit in memory, but {error}. Start it again with a larger "
                "`trainer.accumulate`."
            ) from error
        [*opened] = self.opened.values()
        micro_batches = int(opened[0].record.batching.get("micro_batches", 1)) if opened else 0
        can_cut = self.config.module is None and not self.config.data.needs_whole_batch
        can_cut = can_cut and micro_batches < self.config.trainer.batch_size
        if len(self.pending) > 1 or not opened or not can_cut or not opened[0].record.steps_planned:
            raise error
        self.too_large.append(micro_batches)
        # a run with two different numbers of micro-batches could not be reproduced
        self.opened.clear()
        self.checkpoint_file.unlink(missing_ok=True)

    def _open(self, *, num_processes: int) -> tuple[list[str], dict[str, Any], int | None, int]:
        """Opens the runs' folders on the first process.

        Returns the names of the runs to train, how the others ended, the step to resume from, and the number of
        micro-batches.
        """
        names = [request.run_folder.path.name for request in self.pending]
        state = read_checkpoint(self.checkpoint_file)
        if state:
            if len(names) == len(state["runs"]) + len(state["ends"]) == 1:  # the folder of a run may have been renamed
                ends = dict(zip(names, state["ends"].values(), strict=False))
                state |= {"runs": names[: len(state["runs"])], "ends": ends}
            if missing := [name for name in names if name not in state["runs"] and name not in state["ends"]]:
                raise RecordError(
                    f"{str(self.checkpoint_file)!r} must have all runs that resume from it, but {missing[0]!r} is "
                    "missing. Remove the file to train from the first step."
                )
            selected = select_runs(state, names)
            if selected["runs"] != state["runs"]:
                write_checkpoint(selected, self.checkpoint_file)
            state = selected
        elif len(names) > 1:  # so that a pack that is killed before its first evaluation resumes with the same runs
            write_checkpoint({"runs": names, "ends": {}}, self.checkpoint_file)
        step = get_step(state)
        for slot, request in enumerate(self.pending):
            path = request.run_folder.path
            if path not in self.opened:
                self.opened[path] = OpenRun(
                    request.config,
                    request.run_folder,
                    self.inputs,
                    # a run that has ended has its last evaluation
                    step=sys.maxsize if path.name in state.get("ends", {}) else step,
                    num_processes=num_processes,
                    too_large=self.too_large,
                    pack={"slot": slot, "slots": len(names)} if len(names) > 1 else None,
                )
        accumulate = int(self.opened[self.pending[0].run_folder.path].record.batching["micro_batches"])
        return state.get("runs", names), state.get("ends", {}), step, accumulate

    def _train(self, group: Fabric) -> dict[str, RunEnd]:
        """Trains the pending runs. Returns how runs ended by the name of their folder, or how all were stopped."""
        names, ended, step, accumulate = run_on_first(group, lambda: self._open(num_processes=group.world_size))
        requests = {request.run_folder.path.name: request for request in self.pending}
        ends = {name: RunEnd(*end) for name, end in ended.items()}
        if ends:  # the process was killed before it closed them
            return ends
        runs = [requests[name] for name in names]
        config, others = self.config, [request.config for request in runs[1:]]
        callbacks = build_callbacks(config)
        module: lightning.LightningModule
        data: lightning.LightningDataModule
        training: TrainingModule | OwnModuleRun
        if config.module is None:
            training = module = TrainingModule(runs[0].config, others=others, inputs=self.inputs, accumulate=accumulate)
            data = DataModule(runs[0].config, others=others, splits=self.inputs.data, accumulate=accumulate)
        else:
            training = own = OwnModuleRun(config, self.inputs)
            module, data, callbacks = own.module, own.data, [*callbacks, own]
        opened = [self.opened[request.run_folder.path] for request in runs] if group.is_global_zero else []
        writer = RunWriter(
            requests=runs,
            inputs=self.inputs,
            group=group,
            on_evaluation=self.on_evaluation,
            stop_requested=self.stop_requested,
            on_phase=self.on_phase,
            checkpoint_file=self.checkpoint_file,
            training=training,
            opened=opened,
            logged_step=step or 0,
        )
        loggers = self._start_loggers(runs, is_first_process=group.is_global_zero)
        is_stopped = False
        with quiet_lightning(), deterministic_algorithms(config.trainer.deterministic):
            # At the end of an evaluation Lightning calls callbacks in this order. The user's callbacks come first,
            # because our checkpoint keeps their state. The writer comes last, because it reads values of the others.
            trainer = self._build_trainer(group, accumulate, [*callbacks, writer], loggers)
            try:
                if config.num_steps:
                    path = None if step is None else self.checkpoint_file
                    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
                # Lightning evaluates every `trainer.eval_every_steps`, so the last steps may lack an evaluation.
                if writer.evaluated_step != trainer.global_step:
                    trainer.validate(module, datamodule=data, verbose=False)
            except RunStopped:
                is_stopped = True
            finally:
                writer.share_time()
                # Lightning's objects refer to each other in cycles. Without this, weights, gradients and moments of
                # many runs would stay in memory until Python's next full garbage collection.
                module._modules.clear()
                trainer.strategy.optimizers = []
                trainer.strategy.lr_scheduler_configs = []
        progress = f"step {trainer.global_step} of {config.num_steps}"
        if is_stopped:
            self.is_stopped = True
            for run in opened:
                run.record.steps_done = trainer.global_step
            return {name: RunEnd("interrupted", f"stopped at {progress}") for name in names}
        if not writer.ends:
            return {name: RunEnd("complete", f"a callback stopped it at {progress}") for name in names}
        return {names[slot]: end for slot, end in writer.ends.items()}

    def _close(self, group: Fabric, ends: dict[str, RunEnd]) -> None:
        """Closes the runs that ended, and reports them."""
        outcomes = run_on_first(group, lambda: self._close_folders(ends))
        ended = [request for request in self.pending if request.run_folder.path.name in ends]
        self.pending = [request for request in self.pending if request not in ended]
        for request in ended:
            self.on_end(request, outcomes[request.run_folder.path.name])
        if group.is_global_zero and not self.pending and not self.is_stopped:
            self.checkpoint_file.unlink(missing_ok=True)

    def _close_folders(self, ends: dict[str, RunEnd]) -> dict[str, RunRecord | Diverged]:
        outcomes: dict[str, RunRecord | Diverged] = {}
        for path, run in self.opened.items():
            if (end := ends.get(path.name)) is None:
                continue
            if end.status == "complete":
                began = time.monotonic()
                try:
                    score_best_weights(run)
                except Diverged as error:
                    end = RunEnd("failed", str(error))
                run.wall_s += time.monotonic() - began
            record = run.close(end.status, end.reason)
            outcomes[path.name] = Diverged(str(end.reason)) if end.status == "failed" else record
        self.opened = {path: run for path, run in self.opened.items() if path.name not in ends}
        return outcomes

    def _give_up(self, error: BaseException) -> None:
        """Closes the record of a run alone after an error. Several runs can resume in smaller packs."""
        if len(self.opened) == 1 and len(self.pending) == 1:
            [run] = self.opened.values()
            run.close_after(error)
        else:
            for run in self.opened.values():
                finish_loggers(run.loggers, is_failed=True)

    def _start_loggers(self, runs: Sequence[RunRequest], *, is_first_process: bool) -> list[Logger]:
        if not is_first_process:  # Lightning needs loggers on every process
            return start_loggers(runs[0].config, runs[0].run_folder.path, is_first_process=False)
        opened = [self.opened[request.run_folder.path] for request in runs]
        return [logger for run in opened for logger in run.loggers or run.start_loggers()]

    def _build_trainer(
        self, group: Fabric, accumulate: int, callbacks: list[lightning.Callback], loggers: list[Logger]
    ) -> lightning.Trainer:
        config, settings = self.config, self.config.trainer
        launch = find_launch(settings)
        steps_between_logs = max(1, settings.max_steps // 200)
        shows_progress = (
            group.is_global_zero and settings.progress and not config.method.trains_nothing and sys.stderr.isatty()
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
            # the module clips each slot by its own setting
            gradient_clip_val=config.optim.clip_norm if config.module is not None else None,
            default_root_dir=self.pending[0].run_folder.path,
        )
        # Lightning's SIGTERM handler sends a message to the other processes, whatever they are doing, and raises in the
        # middle of a step. So it must not replace the handler of this process.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer


def _find_rank(config: RunConfig) -> int:
    """Returns the rank by which slots are sorted, because neighbours of similar rank train faster."""
    return bind(config.method).get_slot_config(()).rank if config.method.packs else 0
