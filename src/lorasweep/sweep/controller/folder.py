"""A sweep's folder while it is open: its lock, its Optuna storage, and the record that shows both to people.

DIR/sweep.json     the record: what was asked for, each trial and its run
DIR/journal.log    Optuna's storage, unless that is a database: one study per arm, and ARM/confirm for its confirm stage
DIR/pack.json      the runs of the pack that trains now, from which a killed sweep resumes
DIR/runs/ARM-0003  one folder per run of the search
DIR/runs/ARM-confirm-0003  one folder per run of the confirm stage
DIR/report         what `lorasweep compare` writes
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage

from lorasweep.disk import why_unwritable
from lorasweep.errors import WorkerError
from lorasweep.record import SweepRecord, utc_now, write_record
from lorasweep.sweep.controller.storage import close_storage, open_study
from lorasweep.sweep.definition.arms import Definition
from lorasweep.training.telemetry import add_telemetry

LOCK_FILE = ".lock"
PACK_FILE = "pack.json"
MAX_SAVE_FRACTION = 0.1
"""Fraction of the time that writing the record may take. Meanwhile the journal has every trial."""


@dataclass(kw_only=True)
class SweepFolder:
    """An open sweep: its folder, record and storage, which no other process has open."""

    path: Path
    definition: Definition
    record: SweepRecord
    storage: BaseStorage
    lock: int
    """File descriptor of the folder's lock. The system releases it when the process ends, however it ends."""
    opened_s: float = field(default_factory=time.monotonic)
    saved_s: float = -math.inf
    """When the folder was opened and when the record was last written, in monotonic seconds."""
    save_duration_s: float = 0.0

    def __post_init__(self) -> None:
        """Remembers what the record holds of earlier sessions, to which this session's time and memory are added."""
        self.makespan_before_s = self.record.makespan_s
        self.telemetry_before = dict(self.record.telemetry)

    def open_study(self, name: str, *, pruner: BasePruner | None = None) -> optuna.Study:
        """Returns a study of the sweep, made if it is missing."""
        full_name = self.record.study_prefix + name
        return open_study(self.storage, full_name, direction=self.record.direction, pruner=pruner)

    def is_due(self) -> bool:
        """Whether the record may be written again without taking more than `MAX_SAVE_FRACTION` of the time."""
        return time.monotonic() - self.saved_s >= self.save_duration_s * (1 / MAX_SAVE_FRACTION - 1)

    def save(
        self, *, usage: Mapping[str, float], status: Literal["running", "complete", "interrupted"] | None = None
    ) -> None:
        """Writes the record.

        Args:
            usage: Time and memory of all workers of this session; the keys are those of `training.telemetry`.
            status: The sweep's new status; None leaves it.

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
        """Makes sure that the folder is in its place and, if an error is given, that it can be written to.

        Raises:
            WorkerError: It is not, so no trial is to blame and the sweep must end here.
        """
        try:
            is_here = os.path.samestat(os.stat(self.path / LOCK_FILE), os.fstat(self.lock))
        except OSError:
            is_here = False
        if not is_here:
            raise _unwritable(self.path, "it was moved or removed") from error
        if error is not None:
            check_writable(self.path, error)

    def note(self, sentences: Sequence[str]) -> None:
        """Keeps sentences on the data in the record, each once; `save` writes them."""
        self.record.notes += [sentence for sentence in sentences if sentence not in self.record.notes]

    def warn(self, sentence: str) -> None:
        """Keeps a sentence of warning in the record, once; `save` writes it."""
        if sentence not in self.record.warnings:
            self.record.warnings.append(sentence)

    def close(self) -> None:
        """Closes the storage and releases the lock, so that the sweep can be resumed."""
        close_storage(self.storage)
        os.close(self.lock)


def check_writable(path: Path, error: BaseException) -> None:
    """Raises `WorkerError` if an error came because a sweep's folder can't be written to."""
    reason = why_unwritable(path, error)
    if reason is not None:
        raise _unwritable(path, reason if path.is_dir() else "it was moved or removed") from error


def _unwritable(path: Path, reason: str) -> WorkerError:
    return WorkerError(
        f"a sweep's folder must stay in place and have room, but {str(path)!r} can't be written to: {reason}. Nothing "
        f"that ended is lost; put that right, then type `lorasweep sweep --resume {path}`."
    )
