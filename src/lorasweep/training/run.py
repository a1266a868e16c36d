"""One run: composes base model, data, method, LightningModule and Trainer, and keeps the record of what happened."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.data.batching import Share
from lorasweep.data.module import DataModule
from lorasweep.disk import why_unwritable
from lorasweep.errors import ConfigError, OutOfMemory, WorkerError, first_line
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import BaseModel
from lorasweep.record import RunRecord, RunStatus, read_run
from lorasweep.training.averaging import PutBack, WeightAveraging
from lorasweep.training.batches import resolve_accumulate
from lorasweep.training.callbacks import (
    Checkpointing,
    GoesOn,
    Logging,
    RunStopped,
    Settling,
    Stopping,
    go_on,
    note_progress,
)
from lorasweep.training.checkpoint import Found, find_checkpoint
from lorasweep.training.environment import (
    Precision,
    deterministic_algorithms,
    device_of,
    reset_peak_memory,
    resolve_device,
)
from lorasweep.training.module import TrainingModule
from lorasweep.training.optim import check_optim
from lorasweep.training.ranks import Ranks, current_ranks, require_ranks
from lorasweep.training.run_log import (
    RunLog,
    RunPlace,
    UnwrittenLog,
    describe_failure,
    describe_stale,
    is_out_of_memory,
    is_stale,
    new_record,
    reopen_record,
)
from lorasweep.training.saving import ShardedModel, WholeModel
from lorasweep.training.shard import check_shardable, shard_model
from lorasweep.training.strategy import RankStrategy, SumGradients
from lorasweep.training.workbench import Workbench, describe_batching


def never_stop() -> bool:
    """The `stop_requested` of a run that nothing interrupts."""
    return False


def train_run(
    config: RunConfig,
    place: RunPlace,
    *,
    bench: Workbench,
    on_evaluation: GoesOn = go_on,
    stop_requested: Callable[[], bool] = never_stop,
    resume: bool = False,
    cluster: ClusterEnvironment | None = None,
) -> RunRecord:
    """Trains one run and returns its record, which is also in its folder.

    A run that is paused (status `paused`) keeps its checkpoint and resumes in a later call. A killed run may report
    evaluations that it reported before, with the same values.

    Args:
        config: The run's settings. Its model, data and precision are those of `bench`.
        place: Where it writes.
        bench: Base model and data.
        on_evaluation: Takes the step and the metrics of every evaluation, and returns whether the run goes on. What it
            returns at the last step, or where early stopping ends the run, has no effect.
        stop_requested: Asked after every step whether to stop with a checkpoint (status `interrupted`).
        resume: Resumes from the folder's newest checkpoint of a run alone, where there is one.
        cluster: Where the processes that train the run together meet; None where this process trains it alone.

    Of several ranks (`ranks.join_ranks`) each calls this with the same run. The first alone writes and asks
    `on_evaluation`; all end alike, by the first error of any.

    A run that runs out of memory begins again with micro-batches of half the rows and twice as many of them per step,
    down to one row: the batch of a step, and what is learned, stay the same.

    Raises:
        Diverged: The loss became NaN or infinite. The record says `failed`.
        OutOfMemory: It does not fit at one row per micro-batch. The record says `infeasible`.
    """
    ranks = current_ranks()
    require_ranks(config.trainer)
    if cluster is not None and cluster.world_size() > 1:
        raise ConfigError(
            f"`trainer.devices` must be 1 with `worker=ray`, but a worker has {cluster.world_size()} processes."
        )
    too_large: list[int] = []
    while True:
        try:
            with bench.telemetry.phase("loading"):
                return _train_session(
                    config, place, bench, on_evaluation, stop_requested, resume=resume, too_large=too_large
                )
        except OutOfMemory:
            with ranks.together():
                used = ranks.broadcast(read_run(place.folder) if ranks.is_first else None)
            assert used is not None
            rows, micro_batches = config.trainer.batch_size, int(used.batching.get("micro_batches", 1))
            if micro_batches >= rows or not used.steps_planned:
                raise
            too_large.append(micro_batches)
        resume = False  # from the beginning: micro-batches of one size throughout, as a run that is repeated has
        free_memory()  # outside of the handler, whose traceback holds the tensors


def _train_session(
    config: RunConfig,
    place: RunPlace,
    bench: Workbench,
    on_evaluation: GoesOn,
    stop_requested: Callable[[], bool],
    *,
    resume: bool,
    too_large: Sequence[int],
) -> RunRecord:
    """Trains to the end, a stop or an error, and closes the record. `too_large`: micro-batches that did not fit."""
    ranks = current_ranks()
    with ranks.together():
        opened = ranks.broadcast(_open_record(config, place, bench, resume=resume) if ranks.is_first else None)
        assert opened is not None
        record, checkpoint, start_step = opened
        log: RunLog = UnwrittenLog(record, place.folder)
        if ranks.is_first:
            log = RunLog(record, place.folder, start_step=start_step)
    if checkpoint is not None and is_stale(record, config.trainer):  # killed between its last evaluation and its end
        log.close("complete", describe_stale(record))
        return record
    reset_peak_memory()
    session = _Session(config, place.folder, bench, log, ranks)
    try:
        with ranks.together(), _out_of_memory_as_such():
            status = session.train(
                on_evaluation, stop_requested, start_step=start_step, checkpoint=checkpoint, too_large=too_large
            )
    except BaseException as error:
        status = status_after(error, place.folder) if ranks.is_first else "failed"
        if (record.status, status) != ("paused", "interrupted"):  # a paused run stays paused, whatever ends the process
            log.close(status, describe_failure(error))
        raise
    if status != "paused":  # which `Settling` closed before the checkpoint
        log.close(status, record.reason)
    return record


def _open_record(
    config: RunConfig, place: RunPlace, bench: Workbench, *, resume: bool
) -> tuple[RunRecord, Path | None, int]:
    """Returns a run's record, and the checkpoint and the step from which it goes on."""
    found = find_checkpoint(place.folder, kind="last") if resume else Found()
    if found.path is not None:
        return reopen_record(place.folder, step=found.step, notes=found.notes), found.path, found.step
    return new_record(config, place, bench, notes=found.notes), None, 0


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
    """One training from a start or a checkpoint to an end or an error, on each of its ranks."""

    config: RunConfig
    folder: Path
    bench: Workbench
    log: RunLog
    ranks: Ranks

    def train(
        self,
        on_evaluation: GoesOn,
        stop_requested: Callable[[], bool],
        *,
        start_step: int,
        checkpoint: Path | None,
        too_large: Sequence[int],
    ) -> RunStatus:
        """Trains, fills the record, and returns how the session ended."""
        config, bench, ranks, record = self.config, self.bench, self.ranks, self.log.record
        accumulate = self._choose_accumulate(too_large or record.batching.get("too_large", []))
        model = prepare_model(config, bench.base)
        record.trainable_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        record.trainable_fraction = record.trainable_params / record.total_params
        method = METHODS[config.method.name]
        saver = WholeModel(model, method, bench.base)
        ranks.connect()
        if config.trainer.strategy == "fsdp":
            whole = prepare_model(config, bench.base) if ranks.is_first else None
            saver = ShardedModel(model, whole=whole, method=method, base=bench.base)
            shard_model(model, config, device=device_of(config.trainer))
        torch.manual_seed(ranks.seed_of(config.seeds.dropout))
        module = TrainingModule(
            model,
            method=method,
            config=config,
            task=bench.parts.task,
            accumulate=accumulate,
            head=bench.base.head,
            ranks=ranks,
        )
        averaging = [] if config.optim.ema_decay is None else [WeightAveraging(config.optim.ema_decay)]
        every = config.trainer.eval_every_steps
        callbacks = [
            *([SumGradients(ranks)] if ranks.size > 1 else []),
            *averaging,
            Logging(self.log, saver=saver, start_step=start_step, telemetry=bench.telemetry, ranks=ranks),
            settling := Settling(on_evaluation, run_log=self.log, config=config.trainer, ranks=ranks),
            Checkpointing(self.folder, ranks=ranks),
            *map(PutBack, averaging),
            Stopping(stop_requested, self.folder, eval_every_steps=every, ranks=ranks),
        ]
        ranks.barrier()
        trainer = _build_trainer(module, self.folder, precision=bench.precision, callbacks=callbacks)
        status = _fit(trainer, module, record, bench=bench, start_step=start_step, checkpoint=checkpoint)
        note_progress(record, module)
        return "paused" if settling.paused else status

    def _choose_accumulate(self, too_large: Sequence[int]) -> int:
        """Returns the micro-batches per step, twice as many as the last that did not fit, and puts them on record."""
        settings, record = self.config.trainer, self.log.record
        accumulate = (
            min(2 * too_large[-1], settings.batch_size)
            if too_large
            else resolve_accumulate(settings, self.bench.parts.train, begun=record)
        )
        record.batching = describe_batching(self.bench, settings, accumulate=accumulate, padding_fraction=0.0)
        if too_large:
            record.batching["too_large"] = list(too_large)
        return accumulate


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


def prepare_model(config: RunConfig, base: BaseModel) -> nn.Module:
    """Returns a model that trains as the method says; the base's own weights are shared and never written.

    Seeds are set here, before anything is drawn.
    """
    torch.manual_seed(config.seeds.dropout)
    model = copy_sharing_weights(base.model)
    generator = torch.Generator().manual_seed(config.seeds.init)
    METHODS[config.method.name].prepare(model, config.method, generator=generator, head=base.head)
    torch.manual_seed(config.seeds.dropout)
    model.train()  # dropout on; Lightning keeps each module's mode and switches it for evaluation
    if config.trainer.activation_checkpointing:
        checkpoint_activations(model)
    if config.trainer.compile:
        model.compile()
    return model


def check_run(config: RunConfig, base: BaseModel) -> None:
    """Makes sure that a run's settings fit its base model, before anything is written.

    Raises:
        ConfigError: They do not, or one has no effect.
    """
    METHODS[config.method.name].check(base.model, config.method, head=base.head)
    check_optim(config)
    if config.trainer.strategy == "fsdp":
        check_shardable(base.model)
    trains_more = bool(base.head) and config.method.name != "frozen"
    if isinstance(config.method, LoraConfig):
        trains_more = trains_more or bool(config.method.modules_to_save)
    if config.optim.lr_ratio_head != 1 and not trains_more:
        raise ConfigError(
            f"`optim.lr_ratio_head` must be 1 for a model without a new head, but got {config.optim.lr_ratio_head!r}, "
            "which would have no effect."
        )


def checkpoint_activations(model: nn.Module) -> None:
    """Has the model compute its blocks' activations again in the backward pass.

    Raises:
        ConfigError: It does not know how.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            "`trainer.activation_checkpointing` must be false for a model that does not support it, but is true."
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]


def _fit(
    trainer: lightning.Trainer,
    module: TrainingModule,
    record: RunRecord,
    *,
    bench: Workbench,
    start_step: int,
    checkpoint: Path | None,
) -> RunStatus:
    settings = module.config.trainer
    data = DataModule(
        bench.parts,
        batch_size=settings.batch_size,
        accumulate=module.accumulate,
        eval_batch_size=settings.eval_batch_size,
        num_steps=settings.max_steps,
        seed=module.config.seeds.data_order,
        start_step=start_step,
        share=Share(module.ranks.rank, module.ranks.size),
    )
    with quiet_lightning(), deterministic_algorithms(settings.deterministic):
        if not record.steps_planned:
            trainer.validate(module, datamodule=data, verbose=False)
            return "complete"
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            if record.last.get("step") != trainer.global_step:  # the last steps did not fill an interval
                trainer.validate(module, datamodule=data, verbose=False)
        except (RunStopped, SIGTERMException) as stop:  # Lightning's own, where SIGTERM comes during an evaluation
            if isinstance(stop, SIGTERMException) and module.ranks.size > 1:
                raise  # the others do not know: it ends them all as an error, and each from its last checkpoint
            record.steps_done = trainer.global_step
            record.reason = f"stopped at step {trainer.global_step} of {record.steps_planned}"
            return "interrupted"
    return "complete"


def _build_trainer(
    module: TrainingModule, folder: Path, *, precision: Precision, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    config, method, ranks = module.config, module.method, module.ranks
    # Lightning takes it from variables of srun, where processes may be no ranks
    setattr(rank_zero_only, "rank", ranks.rank)  # noqa: B010
    show = ranks.is_first and config.trainer.progress and config.method.name != "frozen" and sys.stderr.isatty()
    if show:
        callbacks = [*callbacks, TQDMProgressBar(refresh_rate=1)]
    with quiet_lightning():
        return lightning.Trainer(
            accelerator=resolve_device(config.trainer),
            devices=1,
            strategy=RankStrategy(ranks, device_of(config.trainer)) if ranks.size > 1 else "auto",
            plugins=[LightningEnvironment()],  # which launches nothing and handles no signal of Slurm's
            precision="bf16-mixed" if precision == "bf16" and method.needs_autocast else "32-true",
            logger=_EventLogger(folder, name="", version="", default_hp_metric=False) if ranks.is_first else False,
            callbacks=callbacks,
            max_epochs=1,
            max_steps=config.trainer.max_steps,
            val_check_interval=config.trainer.eval_every_steps * module.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, config.trainer.max_steps // 200),
            enable_checkpointing=False,
            enable_progress_bar=show,
            enable_model_summary=False,
            accumulate_grad_batches=module.accumulate,
            gradient_clip_val=config.optim.clip_norm,
            default_root_dir=folder,
        )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leaves out Lightning's log lines, and its advice on loader workers and intervals, which is not for our users."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # ours starts at a step
            warnings.filterwarnings("ignore", message=".*this fit will run with no optimizer.*")  # a pack has its own
            warnings.filterwarnings("ignore", message="It is recommended to use .*sync_dist=True")  # all have the same
            warnings.filterwarnings("ignore", message="The `srun` command is available")  # on a cluster's login node
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _EventLogger(TensorBoardLogger):
    """TensorBoard's event file without Lightning's empty `hparams.yaml` beside it."""

    @rank_zero_only
    def save(self) -> None:
        if self._experiment is not None:
            self._experiment.flush()
