"""The lock of a sweep's folder: the process that runs the sweep holds it."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

from lorasweep.errors import RecordError

LOCK_FILE = ".lock"


def is_running(path: Path) -> bool:
    """Returns whether a process has a sweep's folder open; False if the file system has no locks."""
    try:
        handle = os.open(path / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def take_lock(path: Path, undo: ExitStack) -> int:
    """Takes the lock and returns its file descriptor. The system releases it when the process ends for any reason.

    Raises:
        RecordError: Another process holds the lock, or the folder's file system has no locks.
    """
    try:
        handle = os.open(path / LOCK_FILE, os.O_CREAT | os.O_RDWR)
        undo.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RecordError(
            f"a sweep must be run by one process, but another one has {str(path)!r} open. Wait for it, or look with "
            f"`lorasweep status {path}`."
        ) from error
    except OSError as error:
        raise RecordError(
            f"a sweep's folder must be writable and on a file system with locks, but {str(path)!r} is not: "
            f"{error.strerror}. Use a local disk."
        ) from error
    return handle
