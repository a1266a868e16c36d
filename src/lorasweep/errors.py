"""The exceptions of lorasweep.

    LoraSweepError
    ├── ConfigError (also a ValueError)   exit code 2
    ├── RecordError                       exit code 2
    ├── RunError                          exit code 1
    │   ├── Diverged
    │   └── OutOfMemory
    └── WorkerError                       exit code 1
        └── RanksLost

`lorasweep.lora`, which may be used alone, raises plain `ValueError`. A message says what must hold, the value that was
given, and what to do.
"""

from __future__ import annotations

from pathlib import Path

INTERRUPTED_EXIT_CODE = 130
"""Exit code of a command that Ctrl-C or a batch system ended before its work was done."""


class LoraSweepError(Exception):
    """Base class of the errors of this package."""


class ConfigError(LoraSweepError, ValueError):
    """A setting, a sweep file or a command line is wrong. `key` is the dotted key of the setting, if it is known."""

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class RecordError(LoraSweepError):
    """A file of a run or a sweep can't be read, or does not fit the request."""


class RunError(LoraSweepError):
    """One training failed."""


class Diverged(RunError):
    """The loss of a run became NaN or infinite."""


class OutOfMemory(RunError):
    """A run or a pack does not fit in memory."""


class WorkerError(LoraSweepError):
    """The process that runs a sweep can't continue."""


class RanksLost(WorkerError):
    """One of the processes of a run ended. The run can resume."""


class SweepInterrupted(KeyboardInterrupt):
    """A sweep was stopped by Ctrl-C or a batch system, after a checkpoint. The message says how to resume it."""

    def __init__(self, message: str, *, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message without its full stop, or its class if it has no message."""
    return _message(error) or type(error).__name__


def describe_error(error: BaseException) -> str:
    """Returns the class of an error and the first line of its message without its full stop."""
    return ": ".join(filter(None, (type(error).__name__, _message(error))))


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # the class may be a user's
        text = ""
    return next(iter(text.strip().splitlines()), "").rstrip(".: ")
