"""A sweep's folder while it is open: its lock, its Optuna storage, and its record.

DIR/sweep.json     the record: what was asked for, each trial and its run
DIR/journal.log    Optuna's storage: studies ARM and ARM/confirm of each arm
DIR/packs          the checkpoint of each pack that trains now, from which a killed sweep resumes
DIR/runs/ARM-0003  one folder per run of the search
DIR/runs/ARM-confirm-0003  one folder per run of the confirm stage
DIR/report         the report, which is written at the sweep's end and by `lorasweep compare`
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from lorasweep.disk import explain_os_error
from lorasweep.errors import RecordError, WorkerError, first_line
from lorasweep.record import JOURNAL_FILE, SweepRecord, SweepState, utc_now, write_record
from lorasweep.sweep.definition.arms import Definition

RUNS_FOLDER = "runs"
PACKS_FOLDER = "packs"
MAX_SAVE_FRACTION = 0.1
"""Maximum fraction of the time that writing the record may take. The journal has the trials that the record lacks."""


class Journal(JournalFileBackend):
    """Optuna's journal file. A write that fails leaves no part of itself."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file, and removes what a killed process left: an unfinished line, and Optuna's lock."""
        super().__init__(str(path), JournalFileOpenLock(str(path)))
        self._path = path
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # Optuna would wait for its holder for 30 s
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        size = self._path.stat().st_size  # raises if the file was moved; Optuna would begin a new one
        try:
            super().append_logs(logs)
        except OSError:
            with suppress(OSError):
                os.truncate(self._path, size)
            raise


def open_storage(folder: Path) -> JournalStorage:
    """Returns Optuna's storage of a sweep: the journal in its folder, whose lock this process holds.

    Raises RecordError if the journal is damaged.
    """
    try:
        return JournalStorage(Journal(folder / JOURNAL_FILE))
    except Exception as error:  # a wrong operation raises errors of many classes in Optuna
        raise damaged_journal(folder, error) from error


def damaged_journal(folder: Path, error: Exception) -> RecordError:
    return RecordError(
        f"{str(folder / JOURNAL_FILE)!r} must be as the sweep wrote it, but is damaged: {first_line(error)}. "
        "Restore it, or start a new sweep."
    )


def find_checkpoint(sweep: Path, pack: str) -> Path:
    """Returns the file from which a pack resumes, whichever worker trains it."""
    return sweep / PACKS_FOLDER / f"{pack}.ckpt"


def name_study(arm: str, stage: Literal["search", "confirm"]) -> str:
    """Returns the name of an arm's study in a stage. An arm's name has no slash, so names are unique."""
    return arm if stage == "search" else f"{arm}/{stage}"


@dataclass(kw_only=True)
class SweepFolder:
    """A sweep that this process has open: its folder, record and storage."""

    path: Path
    definition: Definition
    record: SweepRecord
    storage: JournalStorage
    lock: int
    """File descriptor of the folder's lock. The system releases it when the process ends for any reason."""
    opened_s: float = field(default_factory=time.monotonic)
    saved_s: float = -math.inf
    """Monotonic time at which the record was last written."""
    save_duration_s: float = 0.0

    def __post_init__(self) -> None:
        # This session's time is added to that of earlier sessions.
        self.makespan_before_s = self.record.makespan_s

    def open_study(self, name: str) -> optuna.Study:
        """Returns a study of the sweep, which is created if it is missing.

        Its sampler is never used: `propose` asks a study in memory. Optuna's tools show the name of its metric.
        """
        study = optuna.create_study(
            study_name=name,
            storage=self.storage,
            direction=self.record.search_metric.direction,
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if study.metric_names is None:
                study.set_metric_names([self.record.search_metric.name])
        return study

    def is_save_due(self) -> bool:
        """Returns whether the record may be written again under `MAX_SAVE_FRACTION`."""
        return time.monotonic() - self.saved_s >= self.save_duration_s * (1 / MAX_SAVE_FRACTION - 1)

    def save(self, *, status: SweepState | None = None) -> None:
        """Writes the record with the time of this session, and perhaps a new status."""
        began = time.monotonic()
        record = self.record
        record.makespan_s = self.makespan_before_s + began - self.opened_s
        if status is not None:
            record.status, record.ended_at = status, utc_now() if status != "running" else None
        (self.path / JOURNAL_FILE).stat()  # raises if the folder was moved; the write would create it again
        write_record(record, self.path)
        self.saved_s = time.monotonic()
        self.save_duration_s = self.saved_s - began

    def note(self, sentences: Sequence[str]) -> None:
        """Adds sentences on the data to the record, each once; `save` writes them."""
        self.record.notes += [sentence for sentence in sentences if sentence not in self.record.notes]

    def warn(self, sentence: str) -> None:
        """Adds a warning to the record, once; `save` writes it."""
        if sentence not in self.record.warnings:
            self.record.warnings.append(sentence)

    def close(self) -> None:
        """Releases the lock, so that the sweep can be resumed."""
        os.close(self.lock)


def check_disk(sweep: Path, error: BaseException) -> None:
    """Raises `WorkerError` if the system refused a file or a folder: no trial is to blame, and the sweep ends."""
    if (reason := explain_os_error(error)) is not None:
        raise WorkerError(
            f"a sweep's files must be there, readable and writable, but the system says: {reason}. No finished run is "
            f"lost. Correct this, then type `lorasweep sweep --resume {sweep}`."
        ) from error
