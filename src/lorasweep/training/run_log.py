"""One run's folder while it trains: its record, its step metrics, its best and last weights.

Used by a run alone (`run`, through `callbacks`) and by each slot of a pack.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasweep.config.build import as_settings
from lorasweep.config.data import Direction
from lorasweep.config.run import RunConfig, TrainerConfig
from lorasweep.data.tasks import goal_direction
from lorasweep.disk import remove_leftovers, write_atomically
from lorasweep.errors import Diverged, LoraSweepError, RecordError
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
from lorasweep.redaction import redact
from lorasweep.training.checkpoint import remove_checkpoints
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

HOST_OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc")
"""What torch says where the host has no memory left."""
Values = dict[str, float]
"""Metrics of one evaluation by name."""
RESUMABLE: frozenset[RunStatus] = frozenset({"interrupted", "paused"})
"""How a session ends of a run that may resume from its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """Where a run belongs: its folder, and its arm and trial if a sweep started it."""

    folder: Path
    arm: str | None = None
    trial: int | None = None


class RunLog:
    """Writes what a run leaves on disk.

    Losses stay on the device until `flush`, so that a GPU is not held up at every step.
    """

    def __init__(self, record: RunRecord, folder: Path, *, start_step: int) -> None:
        self.record = record
        self.folder = folder
        self._pending: list[tuple[int, list[Tensor], float]] = []
        self._before_s, self._started = record.wall_s, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "best", folder / "last"):
            remove_leftovers(place)
        # checkpoints first: one of a later step must not be found once the rows up to it are gone
        remove_checkpoints(folder, after_step=start_step)
        _keep_steps_up_to(folder / STEPS_FILE, start_step)
        if record.code.get("patch", {}).get("file") and not (folder / PATCH_FILE).exists():
            write_atomically(folder / PATCH_FILE, code_patch())
        write_record(record, folder)

    def note_step(self, step: int, micro_losses: list[Tensor], lr: float) -> None:
        """Keeps the micro-batches' shares of a step's loss and its learning rate until the next flush."""
        self._pending.append((step, micro_losses, lr))

    def flush(self, tokens_per_s: float) -> list[dict[str, Any]]:
        """Writes the steps since the last flush and returns their rows.

        Raises:
            Diverged: One of their losses is NaN or infinite.
        """
        rows: list[dict[str, Any]] = []
        for step, losses, lr in self._pending:
            loss = torch.stack(losses).sum().item()
            kept = loss if math.isfinite(loss) else None
            rows.append({"step": step, "loss": kept, "lr": lr, "tokens_per_s": round(tokens_per_s, 1)})
        self._pending = []
        self._append(rows)
        for row in rows:
            if row["loss"] is None:
                raise Diverged(f"the training loss became NaN or infinite at step {row['step']}. Lower `optim.lr`.")
        return rows

    def note_evaluation(self, step: int, values: Values, *, save: Callable[[Path], None]) -> float:
        """Writes an evaluation and the record, and keeps the best and the last weights; returns the score.

        Args:
            step: Optimizer steps done.
            values: Every metric.
            save: Writes the present weights into a folder.

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
        return value

    def close(
        self,
        status: RunStatus,
        reason: str | None,
        *,
        wall_s: float | None = None,
        keep_checkpoints: bool = False,
    ) -> None:
        """Writes the record of the session's end, with the checksums of what was kept.

        Args:
            status: How the session ended.
            reason: Why, where it is not complete.
            wall_s: Seconds of this session; measured from the opening when None.
            keep_checkpoints: Whether to leave the checkpoints of a run that ended to the caller; those of a run that
                may resume stay in any case.
        """
        record, folder = self.record, self.folder
        record.wall_s = self._before_s + (time.monotonic() - self._started if wall_s is None else wall_s)
        record.status, record.reason, record.ended_at = status, reason, utc_now()
        record.peak_memory_bytes = peak_memory_bytes()
        kept = [path for part in ("best", "last") for path in sorted((folder / part).glob("*")) if path.is_file()]
        record.files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in kept
        }
        record.adapter_bytes = sum(path.stat().st_size for path in (folder / "best").glob("*.safetensors"))
        write_record(record, folder)
        if not keep_checkpoints and status not in RESUMABLE:
            remove_checkpoints(folder)

    def _append(self, rows: list[dict[str, Any]]) -> None:
        with (self.folder / STEPS_FILE).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that counts on these rows comes next


def new_record(
    config: RunConfig, place: RunPlace, inputs: RunInputs, *, num_processes: int = 1, notes: Sequence[str] = ()
) -> RunRecord:
    """Returns the record of a run that begins, with everything it can be repeated from, and more notes."""
    splits = {"train": inputs.splits.train, "validation": inputs.splits.validation}
    platform = describe_platform(inputs.precision, resolve_device(config.trainer))
    if num_processes > 1:
        platform |= {"processes": num_processes, "strategy": config.trainer.strategy_name}
    return RunRecord(
        status="running",
        config=as_settings(config),
        arm=place.arm,
        trial=place.trial,
        metric=inputs.splits.metric,
        direction=goal_direction(inputs.splits.metric),
        command=describe_command(),
        code=describe_code(),
        packages=describe_packages(),
        platform=platform,
        environment=describe_environment(),
        notes=[*inputs.notes, *notes],
        data={name: split.describe() for name, split in splits.items()},
        base=inputs.base.describe(),
        started_at=utc_now(),
        steps_planned=0 if config.method.name == "frozen" else config.trainer.max_steps,
        total_params=inputs.base.num_parameters,
    )


def reopen_record(folder: Path, *, step: int, notes: Sequence[str] = ()) -> RunRecord:
    """Returns the record of a run that resumes, as it was at a step.

    Args:
        folder: The run's.
        step: That of the checkpoint. A killed run's record may be ahead of it.
        notes: Sentences to add.
    """
    record = read_run(folder)
    record.notes += [note for note in notes if note not in record.notes]
    record.status, record.reason, record.ended_at = "running", None, None
    record.test = {}
    if record.last.get("step", 0) > step:
        record.best, record.last, record.steps_done = {}, {}, 0
        for row in read_steps(folder, having='"validation"'):
            if row["step"] <= step:
                note_score(record, row["step"], row["validation"])
    return record


def end_paused_run(folder: Path, *, reason: str) -> RunRecord:
    """Makes a paused run a pruned one, which can't resume; returns its record. Repeated calls change nothing.

    Args:
        folder: The run's.
        reason: Why it is pruned.

    Raises:
        RecordError: The run is neither paused nor pruned, or has no record.
    """
    record = read_run(folder)
    if record.status not in ("paused", "pruned"):
        raise RecordError(f"a run must be paused before it is pruned, but {str(folder)!r} is {record.status}.")
    if record.status == "paused":
        record.status, record.reason = "pruned", reason
        write_record(record, folder)
    remove_checkpoints(folder)  # also after a kill between the two
    return record


def note_score(record: RunRecord, step: int, values: Values) -> bool:
    """Puts an evaluation into a record, and returns whether it is the best."""
    record.last, record.steps_done = {"step": step, **values}, step
    if record.score is not None and not is_better(values[record.metric], record.score, direction=record.direction):
        return False
    record.best = dict(record.last)
    return True


def is_stale(record: RunRecord, config: TrainerConfig) -> bool:
    """Whether so many evaluations in a row brought nothing better that the run is to end early."""
    if config.early_stop_evaluations is None or not record.best:
        return False
    steps = record.steps_done - record.best["step"]
    return steps >= config.early_stop_evaluations * config.eval_every_steps


def describe_stale(record: RunRecord) -> str:
    """Returns why a run ended early."""
    return f"no better score since step {record.best['step']:.0f}: stopped early at step {record.steps_done}"


def describe_pause(record: RunRecord) -> str:
    """Returns why a run is paused."""
    return f"paused at step {record.steps_done} of {record.steps_planned}"


def is_better(value: float, other: float, *, direction: Direction) -> bool:
    """Whether a score beats another."""
    return value < other if direction == "minimize" else value > other


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or the device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in HOST_OUT_OF_MEMORY)


def describe_failure(error: BaseException) -> str:
    """Returns the sentence of one of our errors, else the traceback; without secrets."""
    ours = isinstance(error, LoraSweepError)
    return str(redact(str(error) if ours else "".join(traceback.format_exception(error)).strip()))


def _keep_steps_up_to(path: Path, step: int) -> None:
    """Cuts a step log back to a checkpoint: what came after it is done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True) if step else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # cut off by a killed process
        if row["step"] <= step:
            kept.append(line)
    write_atomically(path, "".join(kept))
