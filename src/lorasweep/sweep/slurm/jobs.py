"""The jobs of a sweep: which arrays were submitted for it, and which of their tasks still run or wait.

DIR/workers/slurm/arrays.json lists the arrays; Slurm knows the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError
from lorasweep.record import utc_now
from lorasweep.sweep.slurm.task import FOLDER, output_of

ARRAYS_FILE = FOLDER / "arrays.json"


@dataclass(frozen=True, kw_only=True)
class SubmittedArray:
    """One array of workers that was submitted for a sweep."""

    job_id: str
    num: int
    submitted_at: str


@dataclass(frozen=True, kw_only=True)
class QueuedTask:
    """One worker of an array that runs, or waits for its turn."""

    job_id: str
    index: str
    state: str
    reason: str
    """Why it waits, in Slurm's word."""
    nodes: str


def note_array(sweep: Path, *, job_id: str, num: int) -> None:
    """Adds an array to the sweep's list."""
    (sweep / ARRAYS_FILE).parent.mkdir(parents=True, exist_ok=True)
    arrays = [*read_arrays(sweep), SubmittedArray(job_id=job_id, num=num, submitted_at=utc_now())]
    write_atomically(sweep / ARRAYS_FILE, json.dumps([asdict(array) for array in arrays], indent=2) + "\n")


def read_arrays(sweep: Path) -> list[SubmittedArray]:
    """Returns the arrays that were submitted for a sweep, in order.

    Raises:
        RecordError: The list is damaged.
    """
    path = sweep / ARRAYS_FILE
    try:
        rows = json.loads(path.read_bytes())
        return [
            SubmittedArray(job_id=str(row["job_id"]), num=int(row["num"]), submitted_at=str(row["submitted_at"]))
            for row in rows
        ]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RecordError(f"{str(path)!r} must list the arrays of Slurm jobs of its sweep, but is damaged.") from error


def read_queue(arrays: Sequence[SubmittedArray]) -> list[QueuedTask] | None:
    """Returns the tasks of these arrays that have not ended, or None where Slurm does not answer now."""
    shown = output_of(["squeue", "--me", "--noheader", "--array", "--format", "%F|%K|%T|%r|%N"])
    if shown is None:
        return None
    known = {array.job_id for array in arrays}
    rows = [row.split("|") for row in shown.splitlines() if row.count("|") == 4]
    return [QueuedTask(job_id=j, index=i, state=s, reason=r, nodes=n) for j, i, s, r, n in rows if j in known]
