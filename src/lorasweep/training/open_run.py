"""A run while it trains: its record, step log, best weights, loggers, and how it ends."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lorasweep.config.build import as_settings
from lorasweep.config.redaction import redact
from lorasweep.config.run import RunConfig, TrainerConfig
from lorasweep.data.batching import cut_buckets
from lorasweep.disk import explain_os_error, remove_leftovers, write_atomically
from lorasweep.errors import Diverged, LoraSweepError, OutOfMemory, WorkerError
from lorasweep.record import (
    ANSWERS_FILE,
    STEPS_FILE,
    RunRecord,
    RunStatus,
    compute_sha256,
    dump_row,
    read_run,
    read_steps,
    utc_now,
    write_record,
)
from lorasweep.training.environment import (
    describe_code,
    describe_command,
    describe_environment,
    describe_packages,
    describe_platform,
    resolve_device,
)
from lorasweep.training.loggers import finish_loggers, start_loggers
from lorasweep.training.memory import peak_memory_bytes
from lorasweep.training.progress import TrainingProgress
from lorasweep.training.run_inputs import RunInputs, require_same_fingerprints

Metrics = dict[str, float]
"""Metrics of one evaluation, by name."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of a run, and its arm and trial if a sweep started it."""

    path: Path
    arm: str | None = None
    trial: int | None = None
    origin: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The sweep, arm and trial from which a single run has its settings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRequest:
    """A run to train, alone or in a slot of a pack."""

    config: RunConfig
    run_folder: RunFolder


class RunEvaluation(NamedTuple):
    """The metrics of a run on validation data after `step` optimizer steps."""

    run: Any
    """The run, as the caller of the training knows it."""
    step: int
    metrics: Metrics


def _open_record(
    config: RunConfig, run_folder: RunFolder, inputs: RunInputs, *, step: int | None, num_processes: int = 1
) -> RunRecord:
    """Returns a new record. If the run resumes, returns the record as it was at the checkpoint after `step` steps."""
    if step is not None:
        record = read_run(run_folder.path)
        require_same_fingerprints(record.fingerprints, inputs.fingerprints(config), config=config, kind="run")
        record.status, record.reason, record.ended_at = "running", None, None
        record.test, record.answers, record.retained = {}, {}, {}
        if record.last.get("step", 0) > step:
            # An evaluation is written before the checkpoint of its step. So the record of a killed run may be ahead.
            record.best, record.last, record.steps_done = {}, {}, 0
            for row in read_steps(run_folder.path, having='"validation"'):
                if row["step"] <= step:
                    update_score(record, row["step"], row["validation"])
        return record
    splits = inputs.splits
    platform = describe_platform(inputs.precision, resolve_device(config.trainer))
    if num_processes > 1:
        platform |= {"processes": num_processes, "strategy": config.trainer.strategy_name}
    return RunRecord(
        status="running",
        config=as_settings(config),
        arm=run_folder.arm,
        trial=run_folder.trial,
        origin=dict(run_folder.origin),
        metric=splits.metric,
        direction=splits.score_metric.direction,
        command=describe_command(),
        code=describe_code(),
        packages=describe_packages(),
        platform=platform,
        environment=describe_environment(),
        notes=[note.text for note in inputs.list_notes(config)],
        data={"train": splits.train.describe(), "validation": splits.describe(splits.validation)},
        base=inputs.base.describe(),
        fingerprints=inputs.fingerprints(config),
        started_at=utc_now(),
        steps_planned=config.num_steps,
        total_params=inputs.base.num_parameters,
    )


class OpenRun:
    """Writes the folder of a run from its beginning, or a checkpoint, until it ends or is interrupted.

    Losses stay on the GPU until `flush`, so that no step waits for the GPU.

    Attributes:
        config: The run's settings.
        folder: The run's folder.
        inputs: Base model and data.
        record: The run's record, as `write_evaluation` and `close` write it.
        progress: Trained tokens and training time, which the writer of the folder keeps up to date.
        error: Why the run diverged; None if it did not.
        loggers: Loggers that `close` ends; empty before `start_loggers`.
        wall_s: Seconds of the run since it was opened. A run in a pack counts its share.
    """

    def __init__(
        self,
        config: RunConfig,
        run_folder: RunFolder,
        inputs: RunInputs,
        *,
        step: int | None,
        num_processes: int = 1,
        too_large: Sequence[int] = (),
        pack: dict[str, Any] | None = None,
    ) -> None:
        """Writes the record, and removes log rows of steps after `step`, because the run repeats them.

        `step` is that of the checkpoint from which the run resumes; None if it begins. `too_large` has the
        micro-batches per step of each earlier attempt that ran out of memory. A resumed run keeps its number of
        micro-batches. `pack` has the slot, and the number of slots.
        """
        self.config, self.folder, self.inputs = config, run_folder.path, inputs
        self.loggers: list[Logger] = []
        self.record = record = _open_record(config, run_folder, inputs, step=step, num_processes=num_processes)
        if step is None:  # a pack that became smaller keeps in the record the slot that the run first had
            record.pack = pack
        too_large = too_large or record.batching.get("too_large", [])
        accumulate = int(record.batching.get("micro_batches", config.trainer.accumulate))
        if too_large:
            accumulate = min(2 * too_large[-1], config.trainer.batch_size)
        record.batching = describe_batching(inputs, config, accumulate=accumulate)
        if too_large:
            record.batching["too_large"] = list(too_large)
        self.progress = TrainingProgress()
        self.wall_s = 0.0
        self.error: Diverged | None = None
        self._pending: list[tuple[int, Tensor, float]] = []
        self._earlier_wall_s = record.wall_s
        self.folder.mkdir(parents=True, exist_ok=True)
        for subfolder in (self.folder, self.folder / "best"):
            remove_leftovers(subfolder)
        if (self.folder / STEPS_FILE).exists():
            rows = (
                read_steps(self.folder) if step is not None else ()
            )  # a new run keeps not even an evaluation at step 0
            kept = [dump_row(row) + "\n" for row in rows if row["step"] <= (step or 0)]
            write_atomically(self.folder / STEPS_FILE, "".join(kept))
        write_record(record, self.folder)

    def start_loggers(self) -> list[Logger]:
        """Starts the loggers of `logger`, and returns them."""
        self.loggers = start_loggers(self.config, self.folder)
        return self.loggers

    def note_trained(self, num_params: int) -> None:
        self.record.trainable_params = num_params
        self.record.trainable_fraction = num_params / self.record.total_params

    def note_step(self, step: int, loss: Float[Tensor, ""], lr: float) -> None:
        """Keeps a step until the next flush."""
        self._pending.append((step, loss, lr))

    def flush(self) -> None:
        """Writes the steps since the last flush into the log and the loggers. Sets `error` if a loss is not finite."""
        rows: list[dict[str, Any]] = []
        # one read for all steps, because each read waits for the GPU
        losses = torch.stack([loss for _, loss, _ in self._pending]).tolist() if self._pending else []
        for (step, _, lr), loss in zip(self._pending, losses, strict=True):
            finite_loss = loss if math.isfinite(loss) else None  # JSON has neither NaN nor infinity
            rows.append(
                {"step": step, "loss": finite_loss, "lr": lr, "tokens_per_s": round(self.progress.tokens_per_s, 1)}
            )
            if finite_loss is None and self.error is None:
                self.error = Diverged(f"the training loss became NaN or infinite at step {step}. Lower `optim.lr`.")
        self._pending = []
        self._append(rows)
        for row in rows:
            metrics = {f"train/{name}": row[name] for name in ("loss", "lr", "tokens_per_s") if row[name] is not None}
            for logger in self.loggers:
                logger.log_metrics(metrics, step=row["step"])
        for logger in self.loggers if rows else ():
            logger.save()

    def write_evaluation(self, step: int, metrics: Metrics, *, save: Callable[[Path], None]) -> None:
        """Writes an evaluation after `step` steps, the best weights, and the record, and logs it.

        `save` writes the current weights into a folder. Sets `error` if the score is not finite.
        """
        self.progress.write_to(self.record)
        try:
            if self.error is None:
                check_score(metrics, metric=self.record.metric, step=step)
        except Diverged as error:
            self.error = error
        if self.error is not None:
            write_record(self.record, self.folder)  # a process that closes the run after a kill knows no tokens
            return
        self._append([{"step": step, "validation": metrics}])
        if update_score(self.record, step, metrics):
            save(self.folder / "best")
        write_record(self.record, self.folder)
        for logger in self.loggers:
            logger.log_metrics({f"validation/{name}": value for name, value in metrics.items()}, step=step)
            logger.save()

    def close(self, status: RunStatus, reason: str | None) -> RunRecord:
        """Writes and returns the final record, with the checksums of weights and answers, and ends the loggers."""
        record, folder = self.record, self.folder
        if self.progress.tokens:  # none if an earlier process trained the run and was killed before it closed it
            self.progress.write_to(record)
        record.wall_s = self._earlier_wall_s + self.wall_s
        record.status, record.reason, record.ended_at = status, reason, utc_now()
        record.peak_memory_bytes = peak_memory_bytes()
        patterns = ("best/*", ANSWERS_FILE.format("*"))
        kept = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
        record.files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": compute_sha256(path)}
            for path in kept
        }
        record.adapter_bytes = sum(path.stat().st_size for path in (folder / "best").glob("*.safetensors"))
        write_record(record, folder)
        finish_loggers(self.loggers, is_failed=status == "failed")
        return record

    def close_after(self, error: BaseException) -> None:
        """Closes a run that an error ended. The reason is the message of one of our errors, else the traceback."""
        is_ours = isinstance(error, LoraSweepError)
        text = str(error) if is_ours else "".join(traceback.format_exception(error)).strip()
        self.close(status_after(error), str(redact(text)))

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with (self.folder / STEPS_FILE).open("a") as file:
            file.writelines(dump_row(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that is written next must not outlive these rows


def check_score(metrics: Metrics, *, metric: str, step: int) -> None:
    """Raises Diverged if the value of the run's metric is NaN or infinite."""
    value = metrics[metric]
    if math.isfinite(value):
        return
    if math.isnan(value) and math.isfinite(metrics.get("loss", math.nan)):
        raise Diverged(
            f"the validation {metric} is NaN at step {step}, although the loss is finite. The metric is not defined "
            "for these predictions. Use another `data.metric`."
        )
    raise Diverged(f"the validation {metric} became {value!r} at step {step}. Lower `optim.lr`.")


def update_score(record: RunRecord, step: int, metrics: Metrics) -> bool:
    """Puts an evaluation into a record, and returns whether its score is the best so far."""
    record.last, record.steps_done = {"step": step, **metrics}, step
    sign = record.score_metric.sign
    if record.score is not None and sign * metrics[record.metric] >= sign * record.score:
        return False
    record.best = dict(record.last)
    return True


def describe_batching(inputs: RunInputs, config: RunConfig, *, accumulate: int) -> dict[str, Any]:
    """Returns how the examples of a run become batches, for its record."""
    attention = None if inputs.attention is None else inputs.attention._asdict()
    lengths, group = inputs.splits.train.row_lengths, config.data.groups_by_length
    buckets = cut_buckets(lengths, batch_size=config.trainer.batch_size, group_by_length=group)
    return {
        "micro_batches": accumulate,
        "bucket_lengths": buckets.lengths,
        "attention": attention,
    }


def find_run_end(
    record: RunRecord, config: TrainerConfig, *, stop_reason: str | None = None
) -> tuple[RunStatus, str | None] | None:
    """Returns the status and reason if a run ends after its last evaluation; None if it continues.

    A run without remaining steps and a run that early stopping ends are complete, even with a `stop_reason`.
    """
    # `steps_done` is not used: an interrupted run may have done steps after its last evaluation. Values of `last` that
    # were read from a file are floats.
    step = int(record.last.get("step", 0))
    if step >= record.steps_planned:
        return "complete", None
    if config.early_stop_evaluations is not None and record.best:
        best_step = record.best["step"]
        if step - best_step >= config.early_stop_evaluations * config.eval_every_steps:
            return "complete", f"no better score since step {best_step:.0f}: stopped early at step {step}"
    return ("stopped", stop_reason) if stop_reason is not None else None


def status_after(error: BaseException) -> RunStatus:
    """Returns the status of a run that an error ended.

    `interrupted` means that the run can resume, because a signal, a worker's end or the system ended it.
    """
    if isinstance(error, OutOfMemory):
        return "infeasible"
    is_fault = isinstance(error, Exception) and not isinstance(error, WorkerError)
    return "failed" if is_fault and explain_os_error(error) is None else "interrupted"
