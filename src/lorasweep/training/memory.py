"""Measures the peak memory of a run, and finds that memory ran out."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lorasweep.errors import OutOfMemory, first_line

HOST_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "std::bad_alloc")
"""Texts in the `RuntimeError` that torch raises if the host has no memory left."""


def reset_peak_memory() -> None:
    """Begins a new measurement of `peak_memory_bytes`. The peak of the process is reset on Linux only.

    On Linux with glibc, it also gives memory that earlier runs no longer use back to the system. Otherwise the peak
    would depend on these runs, and a sweep of many runs would take more and more memory.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak_memory_bytes() -> int:
    """Returns the peak of allocated GPU memory since the reset; without a GPU, that of resident memory."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else process_peak_bytes()


def process_peak_bytes() -> int:
    """Returns the peak resident memory of the process since the reset."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def total_memory_bytes() -> int:
    """Returns the memory that this process and others of its control group may use: all of the machine, or a limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # the file has `max` without a limit
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return machine


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
