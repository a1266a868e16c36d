"""A sweep's folder while it is open: its lock, its Optuna storage, and the record that shows both to people.

DIR/sweep.json     the record: what was asked for, each trial and its run
DIR/journal.log    Optuna's storage, unless that is a database: one study per arm, and ARM/confirm for its confirm stage
DIR/pack.json      the runs of the pack that trains now, from which a killed sweep goes on
DIR/runs/ARM-0003  one folder per run of the search
DIR/runs/ARM-confirm-0003  and per run of the confirm stage
DIR/report         what `lorasweep compare` writes
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage

from lorasweep.disk import why_unwritable
from lorasweep.errors import WorkerError
from lorasweep.record import ConfirmRow, SweepRecord, TrialRow, utc_now, write_record
from lorasweep.sweep.controller.storage import close_storage, open_study
from lorasweep.sweep.definition.arms import Definition
from lorasweep.training.telemetry import add_telemetry

LOCK_FILE = ".lock"
PACK_FILE = "pack.json"
MOVED = "it was moved or removed"
MAX_SAVE_SHARE = 0.1
"""Most of the time that writing the record may take. The journal has everything meanwhile."""


@dataclass(kw_only=True)
class SweepFolder:
    """An open sweep: its folder, record and storage, which no other process has open."""

    path: Path
    definition: Definition
    record: SweepRecord
    storage: BaseStorage
    lock: int
    """File descriptor of the folder's lock. The system lets go of it when the process ends, however it ends."""
    measure: Callable[[], dict[str, float]] = dict
    """Returns the telemetry of all workers of this session."""
    opened: float = field(default_factory=time.monotonic)
    makespan_before_s: float = 0.0
    telemetry_before: dict[str, float] = field(default_factory=dict)
    """Of earlier sessions."""
    saved: float = -math.inf
    save_s: float = 0.0
    """When the record was last written (monotonic seconds), and how long that took."""

    def open_study(self, name: str, *, pruner: BasePruner | None = None) -> optuna.Study:
        """Returns a study of the sweep, made if it is missing."""
        full_name = self.record.study_prefix + name
        return open_study(self.storage, full_name, direction=self.record.direction, pruner=pruner)

    def is_due(self) -> bool:
        """Whether the record may be written again without taking more than `MAX_SAVE_SHARE` of the time."""
        return time.monotonic() - self.saved >= self.save_s * (1 / MAX_SAVE_SHARE - 1)

    def save(
        self,
        *,
        trials: Sequence[TrialRow],
        confirm: Sequence[ConfirmRow],
        status: Literal["running", "complete", "interrupted"] | None = None,
    ) -> None:
        """Writes the record.

        Args:
            trials: Every trial of the search.
            confirm: Every run of the confirm stage.
            status: What became of the sweep; None leaves it.

        Raises:
            WorkerError: The folder is gone.
        """
        began = time.monotonic()
        self.check_disk()
        record = self.record
        record.makespan_s = self.makespan_before_s + began - self.opened
        record.telemetry = add_telemetry(self.telemetry_before, self.measure())
        record.trials, record.confirm = list(trials), list(confirm)
        if status is not None:
            record.status, record.ended_at = status, utc_now() if status != "running" else None
        write_record(record, self.path)
        self.saved = time.monotonic()
        self.save_s = self.saved - began

    def check_disk(self, error: BaseException | None = None) -> None:
        """Makes sure that the folder is there and, where something failed, that it can be written to.

        Raises:
            WorkerError: It is not, so no trial is to blame and the sweep must end here.
        """
        if not self._is_here():
            raise _unwritable(self.path, MOVED) from error
        if error is not None:
            check_writable(self.path, error)

    def note(self, sentences: Sequence[str]) -> None:
        """Keeps sentences on the data in the record, each once; `save` writes them."""
        self.record.notes += [sentence for sentence in sentences if sentence not in self.record.notes]

    def warn(self, sentence: str) -> None:
        """Keeps a sentence in the record, once; `save` writes it."""
        if sentence not in self.record.warnings:
            self.record.warnings.append(sentence)

    def close(self) -> None:
        """Lets go of the sweep, so that it can be resumed."""
        close_storage(self.storage)
        os.close(self.lock)

    def _is_here(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path / LOCK_FILE), os.fstat(self.lock))
        except OSError:
            return False


def check_writable(path: Path, error: BaseException) -> None:
    """Raises `WorkerError` where an error came because a sweep's folder can't be written to."""
    reason = why_unwritable(path, error)
    if reason is not None:
        raise _unwritable(path, reason if path.is_dir() else MOVED) from error


def _unwritable(path: Path, reason: str) -> WorkerError:
    return WorkerError(
        f"a sweep's folder must stay in place and have room, but {str(path)!r} can't be written to: {reason}. Nothing "
        f"that ended is lost; put that right, then type `lorasweep sweep --resume {path}`."
    )
