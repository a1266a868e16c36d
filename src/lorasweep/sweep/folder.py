"""A sweep's folder while it is open: its studies, and its record kept in step with them.

DIR/sweep.json     the record: what was asked for, each trial and its run
DIR/journal.log    Optuna's storage, unless that is a database: one study per arm, and ARM/confirm for its confirm stage
DIR/workers        one file per worker, with its heartbeat
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
from typing import Any

import optuna
from optuna.trial import TrialState

from lorasweep.disk import why_unwritable
from lorasweep.errors import RecordError, WorkerError
from lorasweep.record import SweepRecord, read_sweep, utc_now, write_record
from lorasweep.sweep.definition import Definition
from lorasweep.sweep.rows import WINNER_ATTRIBUTE, confirm_row, trial_row
from lorasweep.sweep.search import measure_importance
from lorasweep.sweep.storage import Studies

LOCK_FILE = ".lock"


@dataclass(kw_only=True)
class SweepFolder:
    """An open sweep: its folder, record and studies, as one process sees them."""

    path: Path
    definition: Definition
    record: SweepRecord
    storage: Studies
    studies: dict[str, optuna.Study]
    """The search of each arm."""
    confirm_studies: dict[str, optuna.Study] = field(default_factory=dict)
    """The confirm stage of each arm, once it has begun."""
    lock: int
    """Shared by all that have the sweep open."""
    has_others: Callable[[], bool] = lambda: False
    """Whether other workers serve the sweep now and write its record too."""
    opened: float = field(default_factory=time.monotonic)
    makespan_before_s: float = 0.0
    stopped_s: float = 0.0
    """For so long this process was stopped meanwhile, as by Ctrl-Z."""
    saved: float = -math.inf
    save_s: float = 0.0
    """When the record was last written, and how long that took."""

    def save(self, status: Any = None) -> None:
        """Writes the record with every trial as the storage has it.

        What is left out while it would take more than a tenth of the time is written later: the storage has it.

        Args:
            status: What became of the sweep. It goes on running where this worker stops and others don't.

        Raises:
            WorkerError: The folder is gone.
        """
        began = time.monotonic()
        if status is None and began - self.saved < 9 * self.save_s:
            return
        self.check_disk()
        self._save(status)
        self.saved = time.monotonic()
        self.save_s = self.saved - began

    def check_disk(self, error: BaseException | None = None) -> None:
        """Makes sure that the folder is there and, where something failed, that it can be written to.

        Raises:
            WorkerError: It is not, so no trial is to blame and the sweep must end here.
        """
        reason = None if self._is_here() else "it was moved or removed"
        if reason is None and error is not None:
            reason = why_unwritable(self.path, error)
        if reason is not None:
            raise WorkerError(
                f"a sweep's folder must stay in place and have room, but {str(self.path)!r} can't be written to: "
                f"{reason}. Nothing that ended is lost; put that right, then type "
                f"`lorasweep sweep --resume {self.path}`."
            ) from error

    def _is_here(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path / LOCK_FILE), os.fstat(self.lock))
        except OSError:
            return False

    def _save(self, status: Any) -> None:
        record = self.record
        record.makespan_s = self.makespan_before_s + time.monotonic() - self.opened - self.stopped_s
        record.trials = [
            trial_row(arm.name, trial)
            for arm in self.definition.arms
            for trial in self.studies[arm.name].get_trials(deepcopy=False)
        ]
        record.confirm = [
            confirm_row(arm, trial, winner=study.user_attrs[WINNER_ATTRIBUTE])
            for arm, study in self.confirm_studies.items()
            for trial in study.get_trials(deepcopy=False)
            if trial.state != TrialState.WAITING
        ]
        if self.has_others():
            status = "running" if status == "interrupted" else status
            self._add_from_others()
        if status is not None:
            record.status = status
            record.ended_at = utc_now() if status != "running" else None
        if status == "complete":
            for row in record.arms:
                row.importance = measure_importance(self.studies[row.name])
        write_record(record, self.path)

    def _add_from_others(self) -> None:
        """Takes over what only the record on disk has: sentences and time. Trials are in the storage."""
        try:
            on_disk = read_sweep(self.path)
        except RecordError:  # the next one is whole
            return
        self.note(on_disk.notes)
        for sentence in on_disk.warnings:
            self.warn(sentence)
        self.record.makespan_s = max(self.record.makespan_s, on_disk.makespan_s)

    def note(self, sentences: Sequence[str]) -> None:
        """Keeps sentences on the data in the record, each once; `save` writes them."""
        self.record.notes += [sentence for sentence in sentences if sentence not in self.record.notes]

    def warn(self, sentence: str) -> None:
        """Keeps a sentence in the record, once; `save` writes it."""
        if sentence not in self.record.warnings:
            self.record.warnings.append(sentence)

    def close(self) -> None:
        """Lets go of the sweep, so that it can be taken up again."""
        self.storage.rest()
        os.close(self.lock)
