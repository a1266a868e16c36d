"""Writes the folder of a run while it trains: the record, the step log, and the best and last weights.

`run` uses this module for a run alone, and `packs.slot_run` for each slot of a pack.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorasweep.config.build import as_settings
from lorasweep.config.run import RunConfig, TrainerConfig
from lorasweep.data.batching import EvaluationSampler, LengthBuckets
from lorasweep.data.rows import padding_fraction as measure_padding
from lorasweep.disk import remove_leftovers, write_atomically
from lorasweep.errors import Diverged
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
from lorasweep.training.checkpoint import get_step, remove_checkpoints
from lorasweep.training.environment import (
    describe_code,
    describe_command,
    describe_environment,
    describe_packages,
    describe_platform,
    peak_memory_bytes,
    resolve_device,
)
from lorasweep.training.run_inputs import RunInputs, require_same_fingerprints
from lorasweep.training.telemetry import TrainingProgress

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
    """A run to train in a pack."""

    config: RunConfig
    run_folder: RunFolder


class RunEvaluation(NamedTuple):
    """The metrics of a run on validation data after `step` optimizer steps."""

    run: Any
    """The run, as the caller of the training knows it."""
    step: int
    metrics: Metrics


class RunLog:
    """Writes the record, the step log and the weights of a run until it ends or is interrupted.

    Losses stay on the GPU until `flush`, so that no step waits for the GPU.
    """

    def __init__(self, record: RunRecord, folder: Path, *, state: Mapping[str, Any]) -> None:
        """Writes the record, and removes log rows after the step of the checkpoint `state`, which the run repeats.

        If the run begins at step 0 (`state` is empty), removes earlier checkpoints.
        """
        self.record = record
        self.folder = folder
        self.progress = TrainingProgress(**state.get("progress", {}))
        self._pending: list[tuple[int, Tensor, float]] = []
        self._earlier_wall_s, self._started_at = record.wall_s, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for subfolder in (folder, folder / "best", folder / "last"):
            remove_leftovers(subfolder)
        # Checkpoints first: a process that is killed in between must not leave a checkpoint whose log rows are missing.
        if not state:
            remove_checkpoints(folder)
        if (folder / STEPS_FILE).exists():
            rows = read_steps(folder) if state else ()  # from step 0 not even an evaluation at step 0 is kept
            kept = [dump_row(row) + "\n" for row in rows if row["step"] <= get_step(state)]
            write_atomically(folder / STEPS_FILE, "".join(kept))
        write_record(record, folder)

    def note_trained(self, num_params: int) -> None:
        self.record.trainable_params = num_params
        self.record.trainable_fraction = num_params / self.record.total_params

    def note_step(self, step: int, losses: Tensor, lr: float) -> None:
        """Keeps a step until the next flush. `losses` has each micro-batch's share of the step's loss."""
        self._pending.append((step, losses, lr))

    def flush(self) -> list[dict[str, Any]]:
        """Writes the steps since the last flush into the step log, and returns these rows.

        Raises:
            Diverged: A loss is NaN or infinite. All rows have been written.
        """
        rows: list[dict[str, Any]] = []
        # one read for all steps, because each read waits for the GPU
        sums = torch.stack([losses.sum() for _, losses, _ in self._pending]).tolist() if self._pending else []
        for (step, _, lr), loss in zip(self._pending, sums, strict=True):
            finite_loss = loss if math.isfinite(loss) else None  # JSON has neither NaN nor infinity
            rows.append(
                {"step": step, "loss": finite_loss, "lr": lr, "tokens_per_s": round(self.progress.tokens_per_s, 1)}
            )
        self._pending = []
        self._append(rows)
        for row in rows:
            if row["loss"] is None:
                raise Diverged(f"the training loss became NaN or infinite at step {row['step']}. Lower `optim.lr`.")
        return rows

    def write_evaluation(self, step: int, metrics: Metrics, *, save: Callable[[Path], None]) -> None:
        """Writes an evaluation after `step` steps, the best and last weights, and the record.

        `save` writes the current weights into a folder.

        Raises:
            Diverged: The score is NaN or infinite.
        """
        self.progress.write_to(self.record)
        check_score(metrics, metric=self.record.metric, step=step)
        self._append([{"step": step, "validation": metrics}])
        if update_score(self.record, step, metrics):
            save(self.folder / "best")
        if self.record.steps_planned:
            save(self.folder / "last")
        write_record(self.record, self.folder)

    def close(self, status: RunStatus, reason: str | None, *, wall_s: float | None = None) -> None:
        """Writes the final record, with the checksums of the kept weights.

        `wall_s` is the time that the run took since this object was created. None: the wall-clock time.
        """
        record, folder = self.record, self.folder
        self.progress.write_to(record)
        record.wall_s = self._earlier_wall_s + (time.monotonic() - self._started_at if wall_s is None else wall_s)
        record.status, record.reason, record.ended_at = status, reason, utc_now()
        record.peak_memory_bytes = peak_memory_bytes()
        patterns = ("best/*", "last/*", ANSWERS_FILE.format("*"))
        kept = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
        record.files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": compute_sha256(path)}
            for path in kept
        }
        record.adapter_bytes = sum(path.stat().st_size for path in (folder / "best").glob("*.safetensors"))
        write_record(record, folder)

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


def open_record(
    config: RunConfig, run_folder: RunFolder, inputs: RunInputs, *, state: Mapping[str, Any], num_processes: int = 1
) -> RunRecord:
    """Returns a new record. If the run resumes, returns the record as it was at the checkpoint `state`."""
    if state:
        step = get_step(state)
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
        notes=list(inputs.list_notes(config)),
        data={"train": splits.train.describe(), "validation": splits.describe(splits.validation)},
        base=inputs.base.describe(),
        fingerprints=inputs.fingerprints(config),
        started_at=utc_now(),
        steps_planned=config.num_steps,
        total_params=inputs.base.num_parameters,
    )


def describe_batching(inputs: RunInputs, config: RunConfig, *, accumulate: int) -> dict[str, Any]:
    """Returns how the examples of a run become batches, for its record."""
    split, trainer = inputs.splits.validation, config.trainer
    batches = EvaluationSampler(split, batch_size=trainer.eval_batch_size).batches
    # `TrainingProgress.write_to` later replaces the 0
    padding = {"train": 0.0, "validation": round(measure_padding(split, batches), 4)}
    attention = None if inputs.attention is None else inputs.attention._asdict()
    lengths, group = inputs.splits.train.row_lengths, config.data.groups_by_length
    buckets = LengthBuckets(lengths, batch_size=trainer.batch_size, group_by_length=group)
    return {
        "micro_batches": accumulate,
        "bucket_lengths": buckets.lengths,
        "padding_fraction": padding,
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
