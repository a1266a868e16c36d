"""Locks on files, let go of by the system when a process ends, however it ends: of the journal, and between workers."""

from __future__ import annotations

import fcntl
import os
import time

from optuna.storages.journal import JournalFileOpenLock

from lorasweep.errors import WorkerError

LONGEST_WAIT_S = 60.0
"""A write takes milliseconds, a proposal seconds at most."""
LOOK_AGAIN_S = 0.01


class FileLock:
    """An advisory lock on a file, for processes of one machine. A context manager, used by one thread."""

    def __init__(self, path: str, *, make: bool = True) -> None:
        """Names the file; `make` has it made where it is missing."""
        self._path = path
        self._flags = os.O_RDWR | (os.O_CREAT if make else 0)
        self._handle: int | None = None

    def __enter__(self) -> int:
        """Waits for the lock and returns the file's descriptor.

        Raises:
            WorkerError: Another process, which may have been stopped in between, does not let go of it.
        """
        assert self._handle is None, "not within itself"
        handle = os.open(self._path, self._flags)
        deadline = time.monotonic() + LONGEST_WAIT_S
        while not try_lock(handle):
            if time.monotonic() > deadline:
                os.close(handle)
                raise WorkerError(
                    f"{self._path!r} must be free within {LONGEST_WAIT_S:.0f} s, but another process keeps it "
                    "locked. End that process, then go on with `lorasweep sweep --resume`."
                )
            time.sleep(LOOK_AGAIN_S)
        self._handle = handle
        return handle

    def __exit__(self, *_: object) -> None:
        """Lets the lock go."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


class JournalLock(JournalFileOpenLock):
    """Optuna's lock of the journal, on the journal file itself.

    Differs from Optuna's locks, which are files beside the journal: a process that is killed while it writes leaves
    such a file behind, and with a relative path the next process then waits for ever. Whoever gets this lock also cuts
    off a line that a killed process left unfinished, because the next line would be glued to it.
    """

    def __init__(self, journal: str) -> None:
        super().__init__(journal)
        self._lock = FileLock(journal, make=False)  # not made anew where the sweep's folder is gone

    def acquire(self) -> bool:
        """Waits for the lock. Called by Optuna before each write; errors as in `FileLock`."""
        _cut_unfinished_line(self._lock.__enter__())
        return True

    def release(self) -> None:
        """Lets the lock go. Called by Optuna after each write."""
        self._lock.__exit__()


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Takes the lock of an open file if that is possible at once, alone or `shared` with others who share it."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _cut_unfinished_line(handle: int) -> None:
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return
    os.ftruncate(handle, os.pread(handle, size, 0).rfind(b"\n") + 1)
