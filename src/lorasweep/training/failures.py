"""How an error ends a run: the run's status and reason."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lorasweep.config.redaction import redact
from lorasweep.disk import explain_os_error
from lorasweep.errors import LoraSweepError, OutOfMemory, RanksLost, WorkerError, first_line
from lorasweep.record import RunStatus

HOST_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "std::bad_alloc")
"""Texts in the `RuntimeError` that torch raises if the host has no memory left."""
LOST_PROCESS_TEXTS = ("gloo", "NCCL", "Connection closed by peer")
"""Texts in the `RuntimeError` that torch raises if another process is gone."""


@contextmanager
def convert_memory_errors() -> Iterator[None]:
    """Raises `OutOfMemory` instead of the various exceptions of Python and torch for missing memory."""
    try:
        yield
    except Exception as error:
        is_host = isinstance(error, RuntimeError) and any(text in str(error) for text in HOST_OUT_OF_MEMORY_TEXTS)
        if is_host or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise OutOfMemory(first_line(error)) from error
        raise


def status_after(error: BaseException) -> RunStatus:
    """Returns the status of a run that an error ended.

    `interrupted` means that the run can resume, because a signal, another process or the system ended it.
    """
    if isinstance(error, OutOfMemory):
        return "infeasible"
    is_fault = isinstance(error, Exception) and not isinstance(error, WorkerError)
    return "failed" if is_fault and explain_os_error(error) is None else "interrupted"


def describe_failure(error: BaseException) -> str:
    """Returns the message of one of our errors, else the traceback; without secrets."""
    is_ours = isinstance(error, LoraSweepError)
    return str(redact(str(error) if is_ours else "".join(traceback.format_exception(error)).strip()))


def convert_lost_process(error: BaseException, *, num_processes: int) -> BaseException:
    """Returns `RanksLost` instead of torch's error that another process is gone, and other errors unchanged."""
    is_torch_error = isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PROCESS_TEXTS)
    if num_processes == 1 or not (is_torch_error or isinstance(error, dist.DistError)):
        return error
    return RanksLost(
        f"all processes of a run must keep running, but one is gone ({first_line(error)[:80]}). Read its own message, "
        "and start the run again to resume from its last checkpoint."
    )
