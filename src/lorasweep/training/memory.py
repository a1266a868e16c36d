"""Measures the free memory of the machine and the peak of a run, and finds that memory ran out."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from lorasweep.errors import OutOfMemory, first_line

HOST_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "std::bad_alloc")
"""Texts in the `RuntimeError` that torch raises if the host has no memory left."""


def free_memory_bytes() -> int:
    """Returns the host's memory that can be allocated now without swapping, within the limits of control groups."""
    return min([int(psutil.virtual_memory().available), *list_cgroup_free_bytes()])


def list_cgroup_free_bytes(
    *, memberships: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yields the bytes that are left of each memory limit of this process's control groups and of their parent groups.

    Cached files count as free, because the system drops them. Containers and Slurm set these limits, and psutil does
    not read them. See cgroups(7): `memberships` has lines `number:controllers:path`. `mount` has the groups of version
    2, and `mount/memory` has the groups of version 1.
    """
    if not memberships.exists():  # macOS
        return
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2 has one hierarchy for all controllers
            root, name, used = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, name, used = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            try:
                limit = int((root / folder / name).read_text())
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)", (root / folder / "memory.stat").read_text(), re.M
                )
                yield limit - int((root / folder / used).read_text()) + int(cached[1] if cached else 0)
            except (OSError, ValueError):  # the group is not visible in a container, or its limit is `max`
                continue


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
