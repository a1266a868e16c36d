"""What a Slurm job of the array does: be a worker of the sweep, and be put in line again where it was stopped.

Imported on the node by submitit, which unpacks a `SlurmTask` and calls it. The worker itself takes the signal.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lorasweep.sweep.rows import RUNS_FOLDER

FOLDER = Path("workers") / "slurm"
"""In a sweep's folder: what submitit writes, and the list of arrays."""
INTERRUPTED = 130
"""Exit code of a worker that was stopped with trials left."""
COMMAND_TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class SlurmTask:
    """One worker of the array. Pickled by submitit, so the command must be found by its name."""

    sweep: Path
    command: Callable[[Sequence[str]], int]
    """Runs a command line of lorasweep in this process and returns its exit code."""

    def __call__(self) -> int:
        """Runs `lorasweep worker DIR` and returns its exit code.

        Where the worker was stopped before its time was over and has done something, the job is put in line again;
        the process then ends without a result, because the job is not over.
        """
        before = _steps_kept(self.sweep)
        code = self.command(["worker", str(self.sweep)])
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # what comes now is too late and must not end the process
        if code == INTERRUPTED and is_first_rank():
            self._go_on_later(has_moved=_steps_kept(self.sweep) != before)
        if code:
            sys.exit(code)  # so that Slurm shows the job as failed
        return code

    def _go_on_later(self, *, has_moved: bool) -> None:
        job_id = own_job_id()
        if job_id is None or not may_go_on(job_id):
            return
        again = f"Then type `lorasweep sweep --resume {self.sweep}`."
        if not has_moved:
            print(
                f"lorasweep: a worker must train a step before its time is over, but job {job_id} did not. "
                f"It is not put in line again. Raise `worker.time_min`. {again}",
                file=sys.stderr,
            )
            return
        refused = run_quietly(["scontrol", "requeue", job_id])
        if refused is None:
            print(f"lorasweep: job {job_id} is in line again", file=sys.stderr, flush=True)
        else:
            print(
                f"lorasweep: job {job_id} must be put in line again to go on, but scontrol says: {refused} {again}",
                file=sys.stderr,
            )


def is_first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process of a job that speaks for it."""
    return environment.get("SLURM_PROCID", "0") == "0"


def job_time_left_s(*, signal_s: float = 0.0) -> float | None:
    """Returns the seconds until this process's Slurm job is told to stop, or None outside of a job or without a limit.

    Args:
        signal_s: So many seconds before the job's end it is told.
    """
    end = os.environ.get("SLURM_JOB_END_TIME") or _read_end(os.environ.get("SLURM_JOB_ID"))
    if end is None or not end.isdigit() or int(end) == 0:
        return None
    return max(0.0, int(end) - time.time() - signal_s)


@cache
def _read_end(job_id: str | None) -> str | None:
    """The end of this process's job where an older Slurm leaves it out of the environment, in seconds since 1970."""
    if job_id is None:
        return None
    shown = output_of(["squeue", "--noheader", "--jobs", job_id, "--format", "%L"])
    left = None if shown is None else parse_duration_s(shown.strip())
    return None if left is None else str(int(time.time() + left))


def parse_duration_s(text: str) -> int | None:
    """Returns the seconds of a duration as Slurm writes it (`[DAYS-]HOURS:MINUTES:SECONDS`), None for `UNLIMITED`."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def own_job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the id of this process's job, `ARRAY_TASK` in an array, or None outside of Slurm.

    The number in SLURM_JOB_ID alone is that of the whole array for one of its tasks.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")


def may_go_on(job_id: str) -> bool:
    """Whether a job whose worker was told to stop is to go on later.

    It is where Slurm still calls it running (a signal before its time is over, or before a machine is taken from it)
    or ends it by its time limit; it is not where a person cancelled it.
    """
    shown = output_of(["scontrol", "show", "job", "--oneliner", job_id]) or ""
    return re.search(r"\bJobState=RUNNING\b|\bReason=TimeLimit\b", shown) is not None


def _steps_kept(sweep: Path) -> int:
    """Grows with every step that any worker of the sweep trains."""
    return sum(path.stat().st_size for path in (sweep / RUNS_FOLDER).glob("*/steps.jsonl"))


def output_of(command: Sequence[str]) -> str | None:
    """Runs a command of Slurm and returns what it printed, or None where it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def run_quietly(command: Sequence[str]) -> str | None:
    """Runs a command of Slurm and returns None, or what it said where it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{error}."
    return None if done.returncode == 0 else f"{done.stderr.strip()}."
