"""The exceptions of lorasweep, drawn as a tree. Caught in two places only: the sweep's worker and `cli`.

    LoraSweepError
    ├── ConfigError (also a ValueError)   a setting, a sweep file or a command line is wrong; exit code 2
    ├── RecordError                       a file of a run or sweep can't be read or doesn't fit; exit code 2
    ├── RunError                          one training failed; exit code 1
    │   ├── Diverged                      its loss became NaN or infinite
    │   └── OutOfMemory                   it does not fit the machine at the smallest micro-batch
    └── WorkerError                       the process that runs a sweep can't go on; exit code 1
        └── RanksLost                     because one that trains with it is gone

`lorasweep.lora`, which people may use alone, raises plain `ValueError`. A message reads
"`what must hold`, but got X. What to do."
"""

from __future__ import annotations


class LoraSweepError(Exception):
    """What every error of this package is."""


class ConfigError(LoraSweepError, ValueError):
    """A setting, a sweep file or a command line is wrong."""


class RecordError(LoraSweepError):
    """A file that a run or a sweep left on disk can't be read, or does not fit the request."""


class RunError(LoraSweepError):
    """One training failed."""


class Diverged(RunError):
    """The loss of a run became NaN or infinite."""


class OutOfMemory(RunError):
    """A run does not fit the machine's memory even at the smallest micro-batch."""


class WorkerError(LoraSweepError):
    """The process that runs a sweep can't go on."""


class RanksLost(WorkerError):
    """A process can't go on, because one that trains with it is gone or ran out of memory. The run may start again."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message without its full stop, for use inside a sentence.

    Of an error without a message, such as Python's own MemoryError, the name of its class.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".: ")


def describe_error(error: Exception) -> str:
    """Returns the kind of an error and its first line, for use inside a sentence."""
    line = next(iter(str(error).strip().splitlines()), "").rstrip(".: ")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
