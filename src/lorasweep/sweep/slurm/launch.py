"""Brings a sweep's workers into Slurm's line: as many as are missing, and whether any of them is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lorasweep.config.slurm import SlurmWorkers
from lorasweep.sweep.slurm.batch import FOLDER, Batch
from lorasweep.sweep.slurm.jobs import QueuedTask, note_array, read_arrays, read_queue
from lorasweep.sweep.slurm.task import SlurmTask

LOOK_EVERY_S = 5.0
"""Between two questions to Slurm, whose controller all users share."""
LOOKS_WITHOUT_WORKERS = 2
"""A job that is put in line again may be missing for a moment."""
ERROR_LINES = 3


def submit_missing(
    workers: SlurmWorkers, sweep: Path, *, name: str, command: Callable[[Sequence[str]], int]
) -> str | None:
    """Submits as many workers as `worker.num` asks for and Slurm does not have; returns the array's job id, if any.

    Args:
        workers: What the jobs are like.
        sweep: The sweep's folder.
        name: The sweep's name.
        command: Runs a command line of lorasweep in the process of a job and returns its exit code.

    Raises:
        WorkerError: Slurm refuses them.
    """
    missing = workers.num - len(read_queue(read_arrays(sweep)) or [])
    if missing < 1:
        return None
    task = SlurmTask(sweep=sweep.resolve(), command=command)
    job_id = Batch(workers, sweep, name=name, num=missing).submit_tasks(task)
    note_array(sweep, job_id=job_id, num=missing)
    return job_id


class Queue:
    """The workers of a sweep that run or wait, as Slurm says now and then."""

    def __init__(self, sweep: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._sweep = sweep
        self._clock = clock
        self._looked = -LOOK_EVERY_S
        self._empty_looks = 0
        self.tasks: list[QueuedTask] = []
        """At the last look."""

    def is_empty(self) -> bool:
        """Whether none is left, by more than one look."""
        now = self._clock()
        if now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self._look()
        return self._empty_looks >= LOOKS_WITHOUT_WORKERS

    def describe(self) -> str:
        """Returns how many workers are in which state: `2 running, 1 pending (Resources)`."""
        states = Counter(_describe(task) for task in self.tasks)
        return ", ".join(f"{count} {state}" for state, count in sorted(states.items(), reverse=True)) or "none"

    def _look(self) -> None:
        tasks = read_queue(read_arrays(self._sweep))
        if tasks is not None:  # Slurm answers
            self.tasks = tasks
            self._empty_looks = 0 if tasks else self._empty_looks + 1


def cancel_command(sweep: Path) -> str:
    """Returns what ends the workers of a sweep."""
    return " ".join(["scancel", *(array.job_id for array in read_arrays(sweep))])


def last_errors(sweep: Path) -> list[str]:
    """Returns the last lines that workers wrote about errors, the newest worker first; none where none wrote any."""
    logs = sorted((sweep / FOLDER).glob("*_log.err"), key=lambda path: path.stat().st_mtime, reverse=True)
    lines = [line for path in logs for line in reversed(path.read_text(errors="replace").splitlines())]
    return [line for line in lines if line.startswith("lorasweep: ") or "error" in line.lower()][:ERROR_LINES]


def _describe(task: QueuedTask) -> str:
    waits = task.state == "PENDING" and task.reason not in ("", "None")
    return f"{task.state.lower()} ({task.reason})" if waits else task.state.lower()
