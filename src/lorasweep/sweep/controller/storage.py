"""Opens the storage of a sweep's studies: a journal in its folder. One process uses it at a time."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from lorasweep.errors import RecordError, first_line

JOURNAL_FILE = "journal.log"
LINE_KEY = "line"
"""Key of the number of a line that a sweep wrote. Optuna ignores it, and lines of other programs have none."""
CHECKSUM_MARK = b',"crc32":'
"""Begins the checksum at the end of a line: the CRC-32 of the line before the mark. Optuna ignores the key."""


class Journal(BaseJournalBackend):
    """A journal file in Optuna's format that no other process writes to.

    *Differs* from Optuna's `JournalFileBackend`: the file is opened and read once, because the lock of the sweep's
    folder admits only one controller. There is no lock file, which a killed process would leave behind. All operations
    of one call to the controller are flushed to the disk together. Each line has its number and a checksum, so that a
    missing or changed part is noticed.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates the file, and removes a line that a killed process left unfinished."""
        self.handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
        content = path.read_bytes()
        self._size = content.rfind(b"\n") + 1
        os.ftruncate(self.handle, self._size)
        self._unread = deque(content[: self._size].splitlines())
        self._num_read = 0
        """Number of numbered lines that Optuna has read."""
        self._is_flushed = True

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yields the operations that Optuna has not read yet.

        Raises:
            ValueError: A line is not JSON or was changed, or lines before it are missing.
        """
        while self._unread:
            log = _parse_line(self._unread.popleft(), number=self._num_read)
            self._num_read += LINE_KEY in log
            yield log

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Writes all operations. If the disk is full, it writes no operation and raises OSError."""
        first = self._num_read + len(self._unread)
        lines = [_write_line({LINE_KEY: number, **log}) for number, log in enumerate(logs, start=first)]
        data = b"".join(lines)
        try:
            if os.write(self.handle, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self.handle, self._size)
            raise
        self._size += len(data)
        self._unread += lines
        self._is_flushed = False

    def flush(self) -> None:
        """Makes sure that a power cut loses no operation."""
        if not self._is_flushed:
            os.fsync(self.handle)
            self._is_flushed = True

    def close(self) -> None:
        self.flush()
        os.close(self.handle)


def check_journal(path: Path) -> None:
    """Raises ValueError if a line of a journal was changed or is missing. A line without an end is being written."""
    number = 0
    for line in path.read_bytes().rpartition(b"\n")[0].splitlines():
        number += LINE_KEY in _parse_line(line, number=number)


def _write_line(log: dict[str, Any]) -> bytes:
    content = json.dumps(log, separators=(",", ":")).encode()
    return content[:-1] + CHECKSUM_MARK + b"%d}\n" % zlib.crc32(content)


def _parse_line(line: bytes, *, number: int) -> dict[str, Any]:
    """Returns the operation of a line. One that a sweep wrote must be whole and have the number."""
    log: dict[str, Any] = json.loads(line)
    if LINE_KEY in log:
        if log[LINE_KEY] != number:
            raise ValueError(f"its line {number + 1} is missing")
        content, mark, checksum = line.strip().rpartition(CHECKSUM_MARK)
        if not mark or b"%d}" % zlib.crc32(content + b"}") != checksum:
            raise ValueError(f"its line {number + 1} was changed")
    return log


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
