"""How a run ends by an error: infeasible where memory ran out, failed by its own fault, else interrupted."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorasweep.disk import why_unwritable
from lorasweep.errors import LoraSweepError, OutOfMemory, WorkerError, first_line
from lorasweep.record import RunStatus
from lorasweep.redaction import redact

HOST_OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc")
"""Words of the plain `RuntimeError` that torch raises where the host has no memory left."""


@contextmanager
def memory_errors_as_ours() -> Iterator[None]:
    """Raises `OutOfMemory` in place of the exceptions by which Python and torch say that memory ran out."""
    try:
        yield
    except Exception as error:
        is_host = isinstance(error, RuntimeError) and any(words in str(error) for words in HOST_OUT_OF_MEMORY)
        if is_host or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise OutOfMemory(first_line(error)) from error
        raise


def status_after(error: BaseException, folder: Path) -> RunStatus:
    """Returns the status of a run that an error ended.

    An interrupted run keeps its checkpoints and may resume: a signal, another process or the disk ended it.
    """
    if isinstance(error, OutOfMemory):
        return "infeasible"
    is_own = isinstance(error, Exception) and not isinstance(error, WorkerError)
    return "failed" if is_own and why_unwritable(folder, error) is None else "interrupted"


def describe_failure(error: BaseException) -> str:
    """Returns the message of one of our errors, else the traceback; without secrets."""
    is_ours = isinstance(error, LoraSweepError)
    return str(redact(str(error) if is_ours else "".join(traceback.format_exception(error)).strip()))
