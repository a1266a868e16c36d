"""A sweep's folder while it is open: its lock, its Optuna storage, and its record.

DIR/sweep.json     the record: what was asked for, each trial and its run
DIR/journal.log    Optuna's storage: studies ARM and ARM/confirm of each arm
DIR/pack.json      the runs of the pack that trains now, from which a killed sweep resumes
DIR/runs/ARM-0003  one folder per run of the search
DIR/runs/ARM-confirm-0003  one folder per run of the confirm stage
DIR/report         what `lorasweep compare` writes
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lorasweep.disk import LOCK_FILE, explain_unwritable
from lorasweep.errors import RecordError, WorkerError, first_line
from lorasweep.record import SweepRecord, add_telemetry, utc_now, write_record
from lorasweep.sweep.definition.arms import Definition

JOURNAL_FILE = "journal.log"

RUNS_FOLDER = "runs"
PACK_FILE = "pack.json"
MAX_SAVE_FRACTION = 0.1
"""Maximum fraction of the time that writing the record may take. The journal has the trials that the record lacks."""


class Journal(JournalFileBackend):
    """Optuna's journal file, to which no other process writes.

    *Differs:* all operations of one call to the controller are flushed to the disk together. The lock of the sweep's
    folder takes the place of a lock file, which a killed process would leave behind.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates the file, and removes a line that a killed process left unfinished."""
        self.handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        self._size = path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self.handle, self._size)
        self._is_flushed = True
        super().__init__(str(path))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes all operations. If the disk is full, it writes no operation and raises OSError."""
        data = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        try:
            if os.write(self.handle, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self.handle, self._size)
            raise
        self._size += len(data)
        self._is_flushed = False

    def flush(self) -> None:
        """Makes sure that a power cut loses no operation."""
        if not self._is_flushed:
            os.fsync(self.handle)
            self._is_flushed = True

    def close(self) -> None:
        self.flush()
        os.close(self.handle)


class SweepStorage(JournalStorage):
    """Optuna's storage of a sweep, with the journal that it writes to."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        super().__init__(journal)


def open_storage(folder: Path) -> SweepStorage:
    """Returns Optuna's storage of a sweep: the journal in its folder, whose lock this process holds.

    Raises:
        RecordError: The journal is damaged.
    """
    journal = Journal(folder / JOURNAL_FILE)
    try:
        return SweepStorage(journal)
    except Exception as error:  # a wrong operation raises errors of many classes in Optuna
        journal.close()
        raise damaged_journal(folder, error) from error


def damaged_journal(folder: Path, error: Exception) -> RecordError:
    return RecordError(
        f"{str(folder / JOURNAL_FILE)!r} must be as the sweep wrote it, but is damaged: {first_line(error)}. "
        "Restore it, or start a new sweep."
    )


def name_study(arm: str, stage: Literal["search", "confirm"]) -> str:
    """Returns the name of an arm's study in a stage. An arm's name has no slash, so names are unique."""
    return arm if stage == "search" else f"{arm}/{stage}"


@dataclass(kw_only=True)
class SweepFolder:
    """A sweep that this process has open: its folder, record and storage."""

    path: Path
    definition: Definition
    record: SweepRecord
    storage: SweepStorage
    lock: int
    """File descriptor of the folder's lock. The system releases it when the process ends for any reason."""
    opened_s: float = field(default_factory=time.monotonic)
    saved_s: float = -math.inf
    """Monotonic time at which the record was last written."""
    save_duration_s: float = 0.0

    def __post_init__(self) -> None:
        # This session's time and memory are added to those of earlier sessions.
        self.makespan_before_s = self.record.makespan_s
        self.telemetry_before = dict(self.record.telemetry)

    def open_study(self, name: str) -> optuna.Study:
        """Returns a study of the sweep, which is created if it is missing.

        Its sampler is never used: `propose` asks a study in memory. Optuna's tools show the name of its metric.
        """
        study = optuna.create_study(
            study_name=name,
            storage=self.storage,
            direction=self.record.direction,
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if study.metric_names is None:
                study.set_metric_names([self.record.metric])
        return study

    def is_save_due(self) -> bool:
        """Returns whether the record may be written again under `MAX_SAVE_FRACTION`."""
        return time.monotonic() - self.saved_s >= self.save_duration_s * (1 / MAX_SAVE_FRACTION - 1)

    def save(
        self, *, usage: Mapping[str, float], status: Literal["running", "complete", "interrupted"] | None = None
    ) -> None:
        """Writes the record with the time and memory of all workers of this session, and perhaps a new status.

        Raises:
            WorkerError: The folder is gone.
        """
        began = time.monotonic()
        self.check_disk()
        record = self.record
        record.makespan_s = self.makespan_before_s + began - self.opened_s
        record.telemetry = add_telemetry(self.telemetry_before, usage)
        if status is not None:
            record.status, record.ended_at = status, utc_now() if status != "running" else None
        write_record(record, self.path)
        self.saved_s = time.monotonic()
        self.save_duration_s = self.saved_s - began

    def check_disk(self, error: BaseException | None = None) -> None:
        """Checks that the folder and its journal still exist and, if an error is given, that the folder is writable.

        Raises:
            WorkerError: The check failed, so no trial is to blame and the sweep must end here.
        """
        if not _is_open_file(self.path / LOCK_FILE, self.lock):
            raise _unwritable(self.path, "it was moved or removed") from error
        if not _is_open_file(self.path / JOURNAL_FILE, self.storage.journal.handle):
            raise WorkerError(
                f"{str(self.path / JOURNAL_FILE)!r} must stay while the sweep runs, but it was moved or removed. "
                "Restore it, or start a new sweep."
            ) from error
        if error is not None:
            check_writable(self.path, error)

    def note(self, sentences: Sequence[str]) -> None:
        """Adds sentences on the data to the record, each once; `save` writes them."""
        self.record.notes += [sentence for sentence in sentences if sentence not in self.record.notes]

    def warn(self, sentence: str) -> None:
        """Adds a warning to the record, once; `save` writes it."""
        if sentence not in self.record.warnings:
            self.record.warnings.append(sentence)

    def close(self) -> None:
        """Closes the storage and releases the lock, so that the sweep can be resumed."""
        self.storage.journal.close()
        os.close(self.lock)


def _is_open_file(path: Path, handle: int) -> bool:
    """Returns whether a path still leads to the file that this process has open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def check_writable(path: Path, error: BaseException) -> None:
    """Raises `WorkerError` if an error occurred because a sweep's folder can't be written to."""
    reason = explain_unwritable(path, error)
    if reason is not None:
        raise _unwritable(path, reason if path.is_dir() else "it was moved or removed") from error


def _unwritable(path: Path, reason: str) -> WorkerError:
    return WorkerError(
        f"a sweep's folder must be writable, but {str(path)!r} can't be written to: {reason}. No finished run is "
        f"lost. Correct this, then type `lorasweep sweep --resume {path}`."
    )
