"""How a sweep stands, read from its folder while workers run and after: its workers, its arms, the time left.

Only files are read, each written whole by its worker, so looking locks and changes nothing and needs no database.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorasweep.errors import RecordError
from lorasweep.record import (
    ArmRow,
    RunRecord,
    SweepRecord,
    WorkerRow,
    folder_of_run,
    read_run,
    read_sweep,
    read_workers,
    winners,
)
from lorasweep.redaction import redact
from lorasweep.sweep.rows import RUNS_FOLDER
from lorasweep.sweep.storage import JOURNAL_FILE
from lorasweep.sweep.workers import LONGEST_BEAT_S, Process, process_of, this_process
from lorasweep.wording import format_bytes

MISSED_BEATS = 4
"""After which a worker on another machine is said to be silent; only other workers decide that it is lost."""
MOST_RUNS = 64
"""Of the runs that go on, so many are looked into."""


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """One worker."""

    row: WorkerRow
    is_alive: bool
    seen_s: float
    """Seconds since its last heartbeat, by its clock and this one."""
    runs: tuple[RunRecord, ...] = ()
    """Those that it trains now, as of their last evaluation."""


@dataclass(frozen=True, kw_only=True)
class ArmStatus:
    """One arm in the search and, where there is one, the confirm stage."""

    name: str
    asked: int
    done: int
    running: int
    pruned: int
    failed: int
    """Failed or infeasible."""
    best: float | None
    best_params: Mapping[str, Any] = field(default_factory=dict)
    seeds_asked: int = 0
    seeds_done: int = 0
    seeds_running: int = 0

    @property
    def left(self) -> float:
        """Runs that are still to be made; one that is running counts half."""
        begun = self.done + self.seeds_done + (self.running + self.seeds_running) / 2
        return max(0.0, self.asked + self.seeds_asked - begun)


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """A sweep at one moment."""

    folder: Path
    record: SweepRecord
    workers: tuple[WorkerStatus, ...]
    arms: tuple[ArmStatus, ...]
    storage: str

    @property
    def live(self) -> list[WorkerStatus]:
        """The workers that serve it now."""
        return [worker for worker in self.workers if worker.is_alive]

    @property
    def is_over(self) -> bool:
        """Whether it is complete, or none of the workers that it had is alive; they may be yet to come."""
        return self.record.status == "complete" or (bool(self.workers) and not self.live)

    @property
    def seconds_left(self) -> float | None:
        """Time for the runs left at the workers' pace so far, shared by those that live; None where it can't be said.

        The pace is the time of all workers over the trials that they ended, so packs and pruning are in it.
        """
        done = sum(worker.row.done for worker in self.workers)
        spent_s = sum(_positive(worker.row.telemetry.get("wall_s")) for worker in self.workers if worker.row.done)
        left = sum(arm.left for arm in self.arms)
        if self.record.status == "complete" or left == 0:
            return 0.0
        return spent_s / done * left / len(self.live) if done and spent_s and self.live else None

    @property
    def tokens_per_s(self) -> float:
        """Tokens that the live workers train per second of their time, pauses included."""
        return sum(pace_of(worker.row) for worker in self.live)


def read_status(folder: Path) -> SweepStatus:
    """Reads how a sweep stands.

    Raises:
        RecordError: The folder is no sweep, or its record is damaged.
    """
    record = read_sweep(folder)
    here, now = this_process(), datetime.now(UTC)
    rows = read_workers(folder)
    return SweepStatus(
        folder=folder,
        record=record,
        workers=tuple(_worker_status(row, folder, here=here, now=now) for row in rows),
        arms=_arm_statuses(record),
        storage=_describe_storage(record, folder),
    )


def pace_of(row: WorkerRow) -> float:
    """Returns the tokens that a worker trained per second since it began."""
    wall_s = _positive(row.telemetry.get("wall_s"))
    return _positive(row.telemetry.get("trained_tokens")) / wall_s if wall_s else 0.0


def _worker_status(row: WorkerRow, folder: Path, *, here: Process, now: datetime) -> WorkerStatus:
    seen_s = _seconds_since(row.beat_at, now)
    is_alive = row.status == "running" and not _is_gone(row, seen_s, here)
    runs = row.running[:MOST_RUNS] if is_alive else []
    return WorkerStatus(
        row=row,
        is_alive=is_alive,
        seen_s=seen_s,
        runs=tuple(run for name in runs if (run := _run(folder, name)) is not None),
    )


def _is_gone(row: WorkerRow, seen_s: float, here: Process) -> bool:
    process = process_of(row)
    if process.is_on_machine_of(here):
        return process.is_dead()
    return seen_s > MISSED_BEATS * LONGEST_BEAT_S


def _seconds_since(moment: str, now: datetime) -> float:
    try:
        return max(0.0, (now - datetime.fromisoformat(moment)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # no time, one without a zone, one that no calendar has
        return math.inf


def _run(folder: Path, name: str) -> RunRecord | None:
    try:
        return read_run(folder_of_run(folder, f"{RUNS_FOLDER}/{name}"))
    except (RecordError, OSError, ValueError):
        return None


def _arm_statuses(record: SweepRecord) -> tuple[ArmStatus, ...]:
    best = winners(record)
    return tuple(_arm_status(arm, record, best.get(arm.name)) for arm in record.arms)


def _arm_status(arm: ArmRow, record: SweepRecord, best: Any) -> ArmStatus:
    states = [trial.state for trial in record.trials if trial.arm == arm.name]
    reruns = [rerun.state for rerun in record.confirm if rerun.arm == arm.name]
    running, seeds_running = states.count("running"), reruns.count("running")
    if best is None:  # nothing of it trains, so it is no winner
        scored = [t for t in record.trials if t.arm == arm.name and t.state == "complete" and t.value is not None]
        best = scored[0] if scored else None
    seeds = len(record.confirm_seeds[:1] if arm.method == "frozen" else record.confirm_seeds)
    return ArmStatus(
        name=arm.name,
        asked=arm.trials,
        done=len(states) - running,
        running=running,
        pruned=states.count("pruned"),
        failed=states.count("failed") + states.count("infeasible"),
        best=None if best is None else best.value,
        best_params={} if best is None else best.params,
        seeds_asked=seeds,
        seeds_done=len(reruns) - seeds_running,
        seeds_running=seeds_running,
    )


def _describe_storage(record: SweepRecord, folder: Path) -> str:
    journal = folder / JOURNAL_FILE
    if journal.is_file():
        return f"journal in the sweep's folder, {format_bytes(journal.stat().st_size)}"
    asked = _asked_for(record.definition)
    name, address = str(asked.get("storage", "journal")), asked.get("storage.url")
    if name == "journal":
        return "journal, which is not in the sweep's folder"
    return str(redact(f"{name} {address}" if address else f"{name}, its address in the environment"))


def _asked_for(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the sweep's file with those of the command line over them."""
    file = definition.get("file")
    layers: Sequence[Any] = (
        file.get("settings") if isinstance(file, Mapping) else None,
        definition.get("overrides"),
    )
    return {str(key): value for layer in layers if isinstance(layer, Mapping) for key, value in layer.items()}


def _positive(value: float | None) -> float:
    return value if value is not None and value > 0 else 0.0
