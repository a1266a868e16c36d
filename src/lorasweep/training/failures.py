"""How an error ends a run: the run's status and reason, and what a failing process tells the other processes."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric

from lorasweep.config.redaction import redact
from lorasweep.disk import explain_unwritable, read_bounded, write_atomically
from lorasweep.errors import LoraSweepError, OutOfMemory, RanksLost, RunError, WorkerError, describe_error, first_line
from lorasweep.record import RunStatus

HOST_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "std::bad_alloc")
"""Texts in the `RuntimeError` that torch raises if the host has no memory left."""
LOST_PROCESS_TEXTS = ("gloo", "NCCL", "Connection closed by peer")
"""Texts in the `RuntimeError` that torch raises if another process is gone."""
FAILURE_FILE = "failed_rank.json"
"""File in a run's folder that says why one of several processes failed. The other processes and the next attempt read
this file."""
FAILURE_WAIT_S = 3.0
"""Maximum seconds that a process waits for `FAILURE_FILE` if another process is gone."""


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


def status_after(error: BaseException, folder: Path) -> RunStatus:
    """Returns the status of a run that an error ended.

    `interrupted` means that the run can resume, because a signal, another process or the disk ended it.
    """
    if isinstance(error, OutOfMemory):
        return "infeasible"
    is_fault = isinstance(error, Exception) and not isinstance(error, WorkerError)
    return "failed" if is_fault and explain_unwritable(folder, error) is None else "interrupted"


def describe_failure(error: BaseException) -> str:
    """Returns the message of one of our errors, else the traceback; without secrets."""
    is_ours = isinstance(error, LoraSweepError)
    return str(redact(str(error) if is_ours else "".join(traceback.format_exception(error)).strip()))


def choose_error_to_raise(error: BaseException, *, group: Fabric, folder: Path, micro_batches: int) -> BaseException:
    """Returns the error that this process should raise instead of the error that ended its training.

    If this process failed first, this function writes the reason into the run's folder. If another process is gone, it
    reads the reason from there.
    """
    rank = group.global_rank
    is_on_all = isinstance(error, LoraSweepError) and not isinstance(error, OutOfMemory)  # every process raises it
    if group.world_size == 1 or is_on_all or not isinstance(error, Exception):
        return error
    is_lost = isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PROCESS_TEXTS)
    if not (is_lost or isinstance(error, dist.DistError)):  # this process failed first
        too_large = micro_batches if isinstance(error, OutOfMemory) else None
        note: dict[str, Any] = {"rank": rank, "reason": describe_error(error), "too_large": too_large}
        write_atomically(folder / FAILURE_FILE, json.dumps(note))
        return error if too_large is None else _describe_out_of_memory(rank)
    note = _read_note(folder, wait_s=FAILURE_WAIT_S)
    if note.get("too_large"):
        return _describe_out_of_memory(note["rank"])
    if note:
        return RunError(f"rank {note['rank']} failed: {note['reason']}")
    return RanksLost(
        f"all processes of a run must keep running, but rank {rank} waits for a process that is gone "
        f"({first_line(error)[:80]}). Start the run again to resume from its last checkpoint."
    )


def pop_failed_micro_batches(folder: Path) -> int | None:
    """Removes `FAILURE_FILE`. If memory ran out, returns the micro-batches per step of that attempt, else None."""
    note = _read_note(folder)
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    return note.get("too_large")


def _describe_out_of_memory(rank: int) -> RanksLost:
    return RanksLost(
        f"rank {rank} ran out of memory. Start the run again, which then uses micro-batches of half the size."
    )


def _read_note(folder: Path, *, wait_s: float = 0.0) -> dict[str, Any]:
    """Returns the content of `FAILURE_FILE`; an empty mapping if no process writes the file in time."""
    deadline = time.monotonic() + wait_s
    while True:
        with suppress(OSError):
            note: dict[str, Any] = json.loads(read_bounded(folder / FAILURE_FILE, folder=folder))
            return note
        if time.monotonic() >= deadline:
            return {}
        time.sleep(0.1)
