"""The folder of a run while it trains: its record, its step log, its best and its last weights.

`callbacks` writes it for a run alone, `packs.slots` for each slot of a pack.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorasweep.config.build import as_settings
from lorasweep.config.run import RunConfig, TrainerConfig
from lorasweep.data.tasks import goal_direction
from lorasweep.disk import remove_leftovers, write_atomically
from lorasweep.errors import Diverged, RecordError
from lorasweep.record import (
    PATCH_FILE,
    STEPS_FILE,
    RunRecord,
    RunStatus,
    read_run,
    read_steps,
    sha256_of,
    utc_now,
    write_record,
)
from lorasweep.training.checkpoint import FoundCheckpoint, remove_checkpoints
from lorasweep.training.environment import (
    code_patch,
    describe_code,
    describe_command,
    describe_environment,
    describe_packages,
    describe_platform,
    peak_memory_bytes,
    resolve_device,
)
from lorasweep.training.inputs import RunInputs

Metrics = dict[str, float]
"""Metrics of one evaluation by name."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of a run, and its arm and trial if a sweep started it."""

    path: Path
    arm: str | None = None
    trial: int | None = None


class RunLog:
    """Writes the record, the step metrics and the weights of one session of a run.

    Losses stay on the device until `flush`, so that no step waits for a GPU.
    """

    def __init__(self, record: RunRecord, folder: Path, *, start_step: int) -> None:
        """Removes what the folder has after the step at which the session begins, and writes the record."""
        self.record = record
        self.folder = folder
        self._pending: list[tuple[int, Tensor, float]] = []
        self._before_s, self._started = record.wall_s, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for subfolder in (folder, folder / "best", folder / "last"):
            remove_leftovers(subfolder)
        # Checkpoints first: a process that is killed in between must not leave a checkpoint without its rows.
        remove_checkpoints(folder, after_step=start_step)
        _keep_rows_up_to(folder / STEPS_FILE, start_step)
        if "patch" in record.code and not (folder / PATCH_FILE).exists():
            write_atomically(folder / PATCH_FILE, code_patch())
        write_record(record, folder)

    def note_step(self, step: int, losses: Tensor, lr: float) -> None:
        """Keeps each micro-batch's share of a step's loss, and the learning rate, until the next flush."""
        self._pending.append((step, losses, lr))

    def flush(self, tokens_per_s: float) -> list[dict[str, Any]]:
        """Writes the steps since the last flush, and returns them as rows of the step log.

        Raises:
            Diverged: One of their losses is NaN or infinite.
        """
        rows: list[dict[str, Any]] = []
        for step, losses, lr in self._pending:
            loss = losses.sum().item()
            finite_loss = loss if math.isfinite(loss) else None  # JSON has neither NaN nor infinity
            rows.append({"step": step, "loss": finite_loss, "lr": lr, "tokens_per_s": round(tokens_per_s, 1)})
        self._pending = []
        self._append(rows)
        for row in rows:
            if row["loss"] is None:
                raise Diverged(f"the training loss became NaN or infinite at step {row['step']}. Lower `optim.lr`.")
        return rows

    def note_evaluation(self, step: int, values: Metrics, *, save: Callable[[Path], None]) -> None:
        """Writes the evaluation after `step` steps, the best and last weights, and the record.

        `save` writes the present weights into a folder.

        Raises:
            Diverged: The score is NaN or infinite.
        """
        value = values[self.record.metric]
        if not math.isfinite(value):
            raise Diverged(f"the validation {self.record.metric} became {value!r} at step {step}. Lower `optim.lr`.")
        self._append([{"step": step, "validation": values}])
        if note_score(self.record, step, values):
            save(self.folder / "best")
        if self.record.steps_planned:
            save(self.folder / "last")
        write_record(self.record, self.folder)

    def close(self, status: RunStatus, reason: str | None, *, wall_s: float | None = None) -> None:
        """Writes the record of the session's end, with the checksums of the kept weights.

        `wall_s` is the session's duration. None: measured since the object was created.
        """
        record, folder = self.record, self.folder
        record.wall_s = self._before_s + (time.monotonic() - self._started if wall_s is None else wall_s)
        record.status, record.reason, record.ended_at = status, reason, utc_now()
        record.peak_memory_bytes = peak_memory_bytes()
        kept = [path for name in ("best", "last") for path in sorted((folder / name).glob("*")) if path.is_file()]
        record.files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in kept
        }
        record.adapter_bytes = sum(path.stat().st_size for path in (folder / "best").glob("*.safetensors"))
        write_record(record, folder)

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with (self.folder / STEPS_FILE).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that is written next relies on these rows


def note_score(record: RunRecord, step: int, values: Metrics) -> bool:
    """Writes an evaluation into a record, and returns whether its score is the best so far."""
    record.last, record.steps_done = {"step": step, **values}, step
    sign = 1 if record.direction == "minimize" else -1
    if record.score is not None and sign * values[record.metric] >= sign * record.score:
        return False
    record.best = dict(record.last)
    return True


def _keep_rows_up_to(path: Path, step: int) -> None:
    """Removes later steps from a step log, because the run repeats them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True) if step else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the process was killed while it wrote the line
        if row["step"] <= step:
            kept.append(line)
    write_atomically(path, "".join(kept))


def open_record(
    config: RunConfig, run_folder: RunFolder, inputs: RunInputs, *, found: FoundCheckpoint, num_processes: int = 1
) -> RunRecord:
    """Returns a new record, or the record in the folder as it was at the checkpoint that was found."""
    if found.path is not None:
        return _reopen_record(run_folder.path, step=found.step, notes=found.notes)
    splits = {"train": inputs.splits.train, "validation": inputs.splits.validation}
    platform = describe_platform(inputs.precision, resolve_device(config.trainer))
    if num_processes > 1:
        platform |= {"processes": num_processes, "strategy": config.trainer.strategy_name}
    return RunRecord(
        status="running",
        config=as_settings(config),
        arm=run_folder.arm,
        trial=run_folder.trial,
        metric=inputs.splits.metric,
        direction=goal_direction(inputs.splits.metric),
        command=describe_command(),
        code=describe_code(),
        packages=describe_packages(),
        platform=platform,
        environment=describe_environment(),
        notes=[*inputs.notes, *found.notes],
        data={name: split.describe() for name, split in splits.items()},
        base=inputs.base.describe(),
        started_at=utc_now(),
        steps_planned=0 if config.method.name == "frozen" else config.trainer.max_steps,  # `frozen` trains nothing
        total_params=inputs.base.num_parameters,
    )


def _reopen_record(folder: Path, *, step: int, notes: Sequence[str]) -> RunRecord:
    record = read_run(folder)
    record.notes += [note for note in notes if note not in record.notes]
    record.status, record.reason, record.ended_at = "running", None, None
    record.test = {}
    if record.last.get("step", 0) > step:
        # A killed run writes an evaluation before the checkpoint of that step, so its record may be ahead.
        record.best, record.last, record.steps_done = {}, {}, 0
        for row in read_steps(folder, having='"validation"'):
            if row["step"] <= step:
                note_score(record, row["step"], row["validation"])
    return record


def end_at_evaluation(record: RunRecord, config: TrainerConfig, *, pauses: bool) -> tuple[RunStatus, str | None] | None:
    """Returns the status and reason with which a run ends at its last evaluation; None if it continues.

    A run that has no steps left, or that early stopping ends, is complete, even if `pauses` asks to pause it.
    """
    step = record.last.get("step", 0)  # not `steps_done`, which is later in a run that was interrupted
    if step >= record.steps_planned:
        return "complete", None
    if config.early_stop_evaluations is not None and record.best:
        best_step = record.best["step"]
        if step - best_step >= config.early_stop_evaluations * config.eval_every_steps:
            return "complete", f"no better score since step {best_step:.0f}: stopped early at step {step}"
    return ("paused", f"paused at step {step} of {record.steps_planned}") if pauses else None


def prune_paused_run(folder: Path, *, reason: str) -> RunRecord:
    """Marks a paused run as pruned, so that it can't resume, and returns its record. Repeated calls change nothing."""
    record = read_run(folder)
    if record.status not in ("paused", "pruned"):
        raise RecordError(f"a run must be paused before it is pruned, but {str(folder)!r} is {record.status}.")
    if record.status == "paused":
        record.status, record.reason = "pruned", reason
        write_record(record, folder)
    remove_checkpoints(folder)  # again for a pruned run: its process may have been killed before it removed them
    return record
