"""The lock on a sweep's journal (Optuna's storage): let go of by the system when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time

from optuna.storages.journal import JournalFileOpenLock

from lorasweep.errors import WorkerError

LONGEST_WAIT_S = 60.0
"""A write takes milliseconds."""


class JournalLock(JournalFileOpenLock):
    """An advisory lock on the journal file itself, for processes of one machine.

    Differs from Optuna's locks, which are files beside the journal: a process that is killed while it writes leaves
    such a file behind, and with a relative path the next process then waits for ever. Whoever gets this lock also cuts
    off a line that a killed process left unfinished, because the next line would be glued to it.
    """

    def __init__(self, journal: str) -> None:
        super().__init__(journal)
        self._journal = journal
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Waits for the lock. Called by Optuna before each write.

        Raises:
            WorkerError: Another process, which may have been stopped while it wrote, does not let go of it.
        """
        handle = os.open(self._journal, os.O_RDWR)  # not made anew where the sweep's folder is gone
        deadline = time.monotonic() + LONGEST_WAIT_S
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                os.close(handle)
                raise WorkerError(
                    f"{self._journal!r} must be free within {LONGEST_WAIT_S:.0f} s, but another process keeps it "
                    "locked. End that process, then go on with `lorasweep sweep --resume`."
                )
            time.sleep(0.01)
        self._handle = handle
        _cut_unfinished_line(handle)
        return True

    def release(self) -> None:
        """Lets the lock go. Called by Optuna after each write."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _cut_unfinished_line(handle: int) -> None:
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return
    os.ftruncate(handle, os.pread(handle, size, 0).rfind(b"\n") + 1)
