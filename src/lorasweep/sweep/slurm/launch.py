"""Brings a sweep's workers into Slurm's line: as many as are missing, and whether any of them is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from lorasweep.config.slurm import SlurmWorkers
from lorasweep.errors import WorkerError
from lorasweep.sweep.slurm.batch import Batch
from lorasweep.sweep.slurm.jobs import QueuedTask, note_array, read_arrays, read_queue
from lorasweep.sweep.slurm.task import FOLDER, SlurmTask, run_quietly

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
        WorkerError: Slurm refuses them, or does not say which ones it has.
    """
    arrays = read_arrays(sweep)
    queued = read_queue(arrays) if arrays else []
    if queued is None:
        raise WorkerError(
            "Slurm must answer before workers are submitted again, but `squeue` does not. Nothing was submitted; the "
            f"workers that run go on. Type `lorasweep sweep --resume {sweep}` later."
        )
    missing = workers.num - len(queued)
    if missing < 1:
        return None
    task = SlurmTask(sweep=sweep.resolve(), command=command)
    job_id = Batch(workers, sweep, name=name, num=missing).submit_tasks(task)
    note_array(sweep, job_id=job_id, num=missing)
    return job_id


class Queue:
    """The workers of a sweep that run or wait, as Slurm says now and then."""

    def __init__(
        self,
        sweep: Path,
        *,
        changed: Callable[[str], None] = lambda state: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins to watch.

        Args:
            sweep: The sweep's folder.
            changed: Called with `describe()` where that has changed.
            clock: Seconds that only ever rise.
        """
        self._sweep = sweep
        self._changed = changed
        self._clock = clock
        self._said = ""
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
        if tasks is None:  # Slurm does not answer
            return
        self.tasks = tasks
        self._empty_looks = 0 if tasks else self._empty_looks + 1
        if tasks and self.describe() != self._said:
            self._said = self.describe()
            self._changed(self._said)


def cancel_command(sweep: Path) -> str:
    """Returns what ends the workers of a sweep."""
    return " ".join(["scancel", *(array.job_id for array in read_arrays(sweep))])


def cancel_waiting(sweep: Path) -> None:
    """Takes the workers of a complete sweep that still wait for their turn out of Slurm's line."""
    if arrays := read_arrays(sweep):
        run_quietly(["scancel", "--state=PENDING", *(array.job_id for array in arrays)])


def has_running_workers(sweep: Path) -> bool:
    """Whether Slurm runs workers of a sweep now."""
    arrays = read_arrays(sweep)
    return bool(arrays) and any(task.state != "PENDING" for task in read_queue(arrays) or [])


def describe_end(sweep: Path) -> WorkerError:
    """Returns what to say where no worker is left and the sweep is not complete."""
    said = " ".join(f"One wrote: {line}" for line in last_errors(sweep)[:1])
    if not any((sweep / FOLDER).glob("*_log.*")):
        said = "None of them wrote there: does every machine see that folder?"
    return WorkerError(
        f"a worker must run until the sweep is complete, but none is left in Slurm's line. {said} "
        f"Their output is in {str(sweep / FOLDER)!r}; to submit them again type `lorasweep sweep --resume {sweep}`."
    )


def last_errors(sweep: Path) -> list[str]:
    """Returns the last lines that workers wrote about errors, the newest worker first; none where none wrote any."""
    logs = sorted((sweep / FOLDER).glob("*_log.err"), key=lambda path: path.stat().st_mtime, reverse=True)
    lines = [line for path in logs for line in reversed(path.read_text(errors="replace").splitlines())]
    return [line for line in lines if line.startswith("lorasweep: ") or "error" in line.lower()][:ERROR_LINES]


def _describe(task: QueuedTask) -> str:
    waits = task.state == "PENDING" and task.reason not in ("", "None")
    return f"{task.state.lower()} ({task.reason})" if waits else task.state.lower()
