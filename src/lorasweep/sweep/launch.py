"""Worker processes on this machine, one per GPU or per group of processor cores; each runs `lorasweep worker DIR`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasweep.config.sweep import LocalWorkers, WorkerConfig
from lorasweep.errors import ConfigError, WorkerError
from lorasweep.record import WORKERS_FOLDER

LOOK_S = 0.2


@dataclass(frozen=True, kw_only=True)
class LocalWorker:
    """One process that was started, and the file with what it says."""

    process: subprocess.Popen[bytes]
    log: Path


def count_workers(config: WorkerConfig) -> int:
    """Returns how many worker processes are to serve a sweep on this machine; a single one is this process.

    Raises:
        ConfigError: There are fewer GPUs, or without a GPU processor cores, than workers.
    """
    if not isinstance(config, LocalWorkers):
        return 1
    gpus, cores = torch.cuda.device_count(), len(_cores())
    if config.num == "auto":
        return max(1, gpus)
    most, what = (gpus, "GPUs") if gpus else (cores, "processor cores")
    if config.num > most:
        raise ConfigError(
            f"`worker.num <= {most}` must hold, the number of {what} that this process may use, but got {config.num!r}."
        )
    return config.num


def start_workers(folder: Path, *, num: int) -> list[LocalWorker]:
    """Starts the workers of a sweep, each on a GPU or a share of the processor cores that is its own.

    They are in sessions of their own: Ctrl-C reaches this process alone, which passes it on.
    """
    return [_start(folder, index, num=num) for index in range(num)]


def watch_workers(
    workers: list[LocalWorker], *, stop_requested: Callable[[], bool], look: Callable[[], None] = lambda: None
) -> None:
    """Waits until all workers have ended, and passes a request to stop on to them.

    Args:
        workers: Those that were started.
        stop_requested: Whether they are to stop after the step that runs.
        look: Called a few times a second.
    """
    told = False
    with _killed_at_last(workers):
        while any(worker.process.poll() is None for worker in workers):
            if stop_requested() and not told:
                told = True
                for worker in workers:
                    _signal(worker.process, signal.SIGTERM)
            look()
            time.sleep(LOOK_S)


def why_ended(workers: list[LocalWorker]) -> WorkerError:
    """Returns what to say where all workers ended and the sweep is not complete."""
    worker = next((worker for worker in workers if worker.process.returncode), workers[0])
    said = _last_line(worker.log)
    return WorkerError(
        f"a worker must run until the sweep is complete, but all of them ended, one with exit code "
        f"{worker.process.returncode}: {said} The whole output is in {str(worker.log.parent)!r}."
    )


def _start(folder: Path, index: int, *, num: int) -> LocalWorker:
    environment, cores = os.environ.copy(), _cores()
    share = cores[index * len(cores) // num : (index + 1) * len(cores) // num] or cores
    if torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    environment.setdefault("OMP_NUM_THREADS", str(len(share)))
    log = folder / WORKERS_FOLDER / f"local-{index}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorasweep", "worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(process.pid, share)  # before it has imported torch and started threads
    return LocalWorker(process=process, log=log)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextmanager
def _killed_at_last(workers: list[LocalWorker]) -> Iterator[None]:
    """Leaves no worker behind where this process is interrupted for the second time."""
    try:
        yield
    except BaseException:
        for worker in workers:
            _signal(worker.process, signal.SIGKILL)
        raise


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        return


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it said nothing."
