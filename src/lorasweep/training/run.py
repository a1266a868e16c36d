"""One run: composes base model, data, method, LightningModule and Trainer, and keeps the record of what happened."""

from __future__ import annotations

import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lorasweep.config.run import RunConfig
from lorasweep.data.module import TextDataModule
from lorasweep.data.parts import DataParts, load_parts
from lorasweep.data.tasks import LanguageModelMetrics, goal_direction
from lorasweep.errors import LoraSweepError, OutOfMemory
from lorasweep.methods import METHODS, Method, copy_sharing_weights
from lorasweep.models.load import BaseModel, load_base
from lorasweep.record import RUN_FILE, RunRecord, RunStatus, read_run, sha256_of, utc_now, write_record
from lorasweep.training.callbacks import CHECKPOINT_FILE, Keeper, Pruning, RunStopped, ShouldStop, StepLog, Stopping
from lorasweep.training.environment import (
    Precision,
    describe_code,
    describe_packages,
    describe_platform,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
)
from lorasweep.training.module import TrainingModule


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What runs on one base model and data set share; loaded once per worker."""

    base: BaseModel
    parts: DataParts
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """Where a run belongs: its folder, and its arm and trial if a sweep started it."""

    folder: Path
    arm: str | None = None
    trial: int | None = None


def build_workbench(config: RunConfig) -> Workbench:
    """Loads the base model and the data of a run.

    Raises:
        ConfigError: The model or data cannot be had; nothing was written.
    """
    precision = resolve_precision(config.trainer)
    base = load_base(config.model, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return Workbench(base=base, parts=load_parts(config.data, tokenizer=base.tokenizer), precision=precision)


def never_prune(slot: int, step: int, value: float) -> bool:
    """The `should_stop` of a run that nothing prunes."""
    return False


def never_stop() -> bool:
    """The `stop_requested` of a run that nothing interrupts."""
    return False


def train_run(
    config: RunConfig,
    place: RunPlace,
    *,
    bench: Workbench,
    should_stop: ShouldStop = never_prune,
    stop_requested: Callable[[], bool] = never_stop,
    resume: bool = False,
) -> RunRecord:
    """Trains one run and returns its record, which is also in its folder.

    Args:
        config: The run's settings. Its model, data and precision are those of `bench`.
        place: Where it writes.
        bench: Base model and data.
        should_stop: Asked after every evaluation whether to prune.
        stop_requested: Asked after every step whether to stop with a checkpoint (status `interrupted`).
        resume: Goes on from the folder's checkpoint where there is one.

    Raises:
        Diverged: The loss became NaN or infinite. The record says `failed`.
        OutOfMemory: It does not fit. The record says `infeasible`.
    """
    method = METHODS[config.method.name]
    checkpoint = place.folder / CHECKPOINT_FILE
    resume = resume and checkpoint.exists() and (place.folder / RUN_FILE).exists()
    record = _reopen_record(place) if resume else _new_record(config, place, bench)
    place.folder.mkdir(parents=True, exist_ok=True)
    write_record(record, place.folder)
    reset_peak_memory()
    clock = _Clock(record)
    try:
        model = prepare_model(config, bench.base)
        record.trainable_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        record.trainable_fraction = record.trainable_params / record.total_params
        module = TrainingModule(model, method=method, config=config, metrics=_metrics(bench))
        status = _fit(
            module,
            record,
            place,
            bench=bench,
            should_stop=should_stop,
            stop_requested=stop_requested,
            checkpoint=checkpoint if resume else None,
        )
    except BaseException as error:
        clock.stop()
        failure = OutOfMemory(str(error).splitlines()[0]) if is_out_of_memory(error) else error
        _close_record(
            record,
            place.folder,
            "infeasible" if isinstance(failure, OutOfMemory) else "failed",
            reason=describe_failure(failure),
        )
        if failure is not error:
            raise failure from error
        raise
    clock.stop()
    record.tokens_trained, record.tokens_per_s = module.tokens_trained, module.tokens_per_s
    _close_record(record, place.folder, status, reason=record.reason)
    if status != "interrupted":
        checkpoint.unlink(missing_ok=True)
    return record


def prepare_model(config: RunConfig, base: BaseModel) -> nn.Module:
    """Returns a model that trains as the method says; the base's own weights are shared and never written.

    Seeds are set here, before anything is drawn.
    """
    torch.manual_seed(config.seeds.dropout)
    model = copy_sharing_weights(base.model)
    generator = torch.Generator().manual_seed(config.seeds.init)
    METHODS[config.method.name].prepare(model, config.method, generator=generator)
    torch.manual_seed(config.seeds.dropout)
    return model.train()  # dropout on; Lightning keeps each module's mode and switches it for evaluation


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or the device."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def describe_failure(error: BaseException) -> str:
    """Returns the sentence of one of our errors, else the traceback."""
    if isinstance(error, LoraSweepError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()


def _fit(
    module: TrainingModule,
    record: RunRecord,
    place: RunPlace,
    *,
    bench: Workbench,
    should_stop: ShouldStop,
    stop_requested: Callable[[], bool],
    checkpoint: Path | None,
) -> RunStatus:
    config, method = module.config, module.method
    start_step = record_step(checkpoint)
    pruning = Pruning(should_stop, metric=record.metric, max_steps=record.steps_planned)
    callbacks: list[lightning.Callback] = [
        StepLog(place.folder, start_step=start_step),
        Keeper(record, place.folder, save=lambda folder: method.save(module.model, folder, base=bench.base)),
        pruning,
        Stopping(stop_requested, place.folder, eval_every_steps=config.trainer.eval_every_steps),
    ]
    trainer = _build_trainer(config, place.folder, method=method, precision=bench.precision, callbacks=callbacks)
    data = TextDataModule(
        bench.parts,
        batch_size=config.trainer.batch_size,
        accumulate=config.trainer.accumulate,
        eval_batch_size=config.trainer.eval_batch_size,
        num_steps=config.trainer.max_steps,
        seed=config.seeds.data_order,
        start_step=start_step,
    )
    with _quiet_lightning():
        if not record.steps_planned:
            trainer.validate(module, datamodule=data, verbose=False)
            return "complete"
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            if record.last.get("step") != trainer.global_step:  # the last steps did not fill an interval
                trainer.validate(module, datamodule=data, verbose=False)
        except RunStopped:
            record.steps_done = trainer.global_step
            record.reason = f"stopped at step {trainer.global_step} of {record.steps_planned}"
            return "interrupted"
        finally:
            module.model.zero_grad(set_to_none=True)
    if pruning.pruned_at is not None:
        record.reason = f"pruned at step {pruning.pruned_at} of {record.steps_planned}"
        return "pruned"
    return "complete"


def record_step(checkpoint: Path | None) -> int:
    """Returns the optimizer step that a checkpoint was written at, 0 without one."""
    if checkpoint is None:
        return 0
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


def _build_trainer(
    config: RunConfig, folder: Path, *, method: Method, precision: Precision, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    show = config.trainer.progress and config.method.name != "frozen" and sys.stderr.isatty()
    if show:
        callbacks = [*callbacks, TQDMProgressBar(refresh_rate=1)]
    with _quiet_lightning():
        return lightning.Trainer(
            accelerator=resolve_device(config.trainer),
            devices=1,
            precision="bf16-mixed" if precision == "bf16" and method.needs_autocast else "32-true",
            logger=_EventLogger(folder, name="", version="", default_hp_metric=False),
            callbacks=callbacks,
            max_epochs=1,
            max_steps=config.trainer.max_steps,
            val_check_interval=config.trainer.eval_every_steps * config.trainer.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=max(1, config.trainer.max_steps // 200),
            enable_checkpointing=False,
            enable_progress_bar=show,
            enable_model_summary=False,
            accumulate_grad_batches=config.trainer.accumulate,
            gradient_clip_val=config.optim.clip_norm,
            default_root_dir=folder,
        )


def _metrics(bench: Workbench) -> LanguageModelMetrics:
    return LanguageModelMetrics(bytes_per_token=bench.parts.validation.bytes_per_token)


def _new_record(config: RunConfig, place: RunPlace, bench: Workbench) -> RunRecord:
    parts = {"train": bench.parts.train, "validation": bench.parts.validation}
    return RunRecord(
        status="running",
        config=asdict(config),
        arm=place.arm,
        trial=place.trial,
        metric=config.data.metric,
        direction=goal_direction(config.data.metric),
        code=describe_code(),
        packages=describe_packages(),
        platform=describe_platform(bench.precision),
        data={name: part.describe() for name, part in parts.items()},
        base={"path": bench.base.path, "fingerprint": bench.base.fingerprint, "parameters": bench.base.num_parameters},
        started_at=utc_now(),
        steps_planned=0 if config.method.name == "frozen" else config.trainer.max_steps,
        total_params=bench.base.num_parameters,
    )


def _reopen_record(place: RunPlace) -> RunRecord:
    record = read_run(place.folder)
    record.status, record.reason, record.ended_at = "running", None, None
    return record


def _close_record(record: RunRecord, folder: Path, status: RunStatus, *, reason: str | None) -> None:
    record.status, record.reason, record.ended_at = status, reason, utc_now()
    record.peak_memory_bytes = peak_memory_bytes()
    kept = [path for part in ("best", "last") for path in sorted((folder / part).glob("*")) if path.is_file()]
    record.files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in kept
    }
    record.adapter_bytes = sum(path.stat().st_size for path in (folder / "best").glob("*.safetensors"))
    write_record(record, folder)


class _Clock:
    """Adds the seconds of this session to a record's `wall_s`."""

    def __init__(self, record: RunRecord) -> None:
        self.record, self.before, self.started = record, record.wall_s, time.monotonic()

    def stop(self) -> None:
        self.record.wall_s = self.before + time.monotonic() - self.started


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Leaves out Lightning's log lines, and its advice on loader workers and intervals, which is not for our users."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # ours starts at a step
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
