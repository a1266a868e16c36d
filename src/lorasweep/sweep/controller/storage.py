"""Opens the storage of a sweep's studies: a journal in its folder. One process uses it at a time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, Literal

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lorasweep.errors import RecordError, first_line

JOURNAL_FILE = "journal.log"


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
