"""How the machines were used: what each worker's time went to, and how long all of them waited for nothing.

Comes after `record`, before `headline` and `summary`. What a worker's file lacks is not known, and not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasweep.errors import RecordError
from lorasweep.record import WORKERS_FOLDER, WorkerRow, WorkerStatus, read_worker
from lorasweep.wording import UNKNOWN, format_bytes, format_count, format_seconds, format_share

NAMES = {
    "loading_s": "loading models and data",
    "saving_s": "saving",
    "storage_s": "asking and telling",
    "waiting_s": "waiting for other workers",
}
"""What idle time can go to; in none of them is the start of a process, and what is between trials."""
MOST = 1e15
"""No worker has so many seconds, tokens or bytes: a larger number, or one below 0, was not measured."""
COLUMNS = (
    *("worker", "host", "device", "job", "status", "started_at", "ended_at", "trials", "wall_s", "training_s"),
    *("evaluating_s", *NAMES, "idle_s", "idle_fraction", "trained_tokens", "tokens_per_s", "peak_memory_bytes"),
    *("cores_used", "gpu_use_fraction", "gpu_peak_memory_bytes", "reason"),
)
"""Of `workers.csv`."""


@dataclass(frozen=True, kw_only=True)
class WorkerUse:
    """One worker, up to its last heartbeat. Null is what it did not say."""

    worker: str
    host: str
    device: str
    job: str | None
    status: WorkerStatus
    started_at: str
    ended_at: str | None
    trials: int
    """Trials that it ended."""
    wall_s: float | None
    training_s: float | None
    evaluating_s: float | None
    loading_s: float | None
    saving_s: float | None
    storage_s: float | None
    waiting_s: float | None
    idle_s: float | None
    """Seconds in which it neither trained nor evaluated."""
    idle_fraction: float | None
    trained_tokens: float | None
    tokens_per_s: float | None
    """Of its training time."""
    peak_memory_bytes: float | None
    cores_used: float | None
    """Processors that it kept busy on average."""
    gpu_use_fraction: float | None
    """Mean over its GPUs."""
    gpu_peak_memory_bytes: float | None
    """Of the GPU with the most."""
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class ClusterUse:
    """All workers of a sweep together."""

    workers: tuple[WorkerUse, ...]
    hosts: int
    wall_s: float
    training_fraction: float | None
    """Shares of `wall_s`; null where no worker said what it did."""
    evaluating_fraction: float | None
    idle_fraction: float | None
    idle_s: float
    """Time of workers in which they neither trained nor evaluated."""
    tokens_per_s: float | None
    """Tokens that all of them trained, over the time of the sweep."""
    peak_memory_bytes: float | None
    """Of the worker with the most."""

    @property
    def lost(self) -> int:
        """How many workers were gone without saying so."""
        return sum(worker.status == "lost" for worker in self.workers)


def read_worker_rows(folder: Path) -> tuple[tuple[WorkerRow, ...], tuple[str, ...]]:
    """Returns the workers of a sweep, the earliest first, and a sentence for each file that can't be read."""
    rows, problems = [], []
    for path in sorted((folder / WORKERS_FOLDER).glob("*.json")):
        try:
            rows.append(read_worker(path))
        except (RecordError, OSError) as error:
            problems.append(f"A worker's file can't be read: {error}")
    return tuple(sorted(rows, key=lambda row: (row.started_at, row.id))), tuple(problems)


def measure_use(rows: Sequence[WorkerRow], *, makespan_s: float) -> ClusterUse | None:
    """Returns how a sweep's workers were used; None for a sweep from before workers had files.

    Args:
        rows: The workers.
        makespan_s: Seconds that the sweep took.
    """
    if not rows:
        return None
    workers = tuple(_use(row) for row in rows)
    wall_s = sum(worker.wall_s or 0.0 for worker in workers)
    known = sum(worker.wall_s or 0.0 for worker in workers if worker.idle_s is not None)
    tokens = sum(worker.trained_tokens or 0.0 for worker in workers)
    return ClusterUse(
        workers=workers,
        hosts=len({worker.host for worker in workers}),
        wall_s=wall_s,
        training_fraction=_share([worker.training_s for worker in workers], known),
        evaluating_fraction=_share([worker.evaluating_s for worker in workers], known),
        idle_fraction=_share([worker.idle_s for worker in workers], known),
        idle_s=sum(worker.idle_s or 0.0 for worker in workers),
        tokens_per_s=tokens / makespan_s if tokens and makespan_s > 0 else None,
        peak_memory_bytes=max((worker.peak_memory_bytes or 0.0 for worker in workers), default=0.0) or None,
    )


def describe_use(use: ClusterUse | None) -> list[str]:
    """Returns how the machines were used in sentences; none where one worker ran the sweep."""
    if use is None or len(use.workers) < 2:
        return []
    hosts = f" on {use.hosts} machines" if use.hosts > 1 else ""
    lost = f" {use.lost} of them {'was' if use.lost == 1 else 'were'} lost." if use.lost else ""
    who = f"{len(use.workers)} workers{hosts}"
    if use.idle_fraction is None:
        return [f"{who} served the sweep.{lost}"]
    doing = f"{format_share(use.training_fraction)} of it training, {format_share(use.evaluating_fraction)} evaluating"
    pace = "" if use.tokens_per_s is None else f"; {format_count(use.tokens_per_s)} tokens per second"
    memory = "" if use.peak_memory_bytes is None else f", at most {format_bytes(use.peak_memory_bytes)} in one process"
    return [
        f"{who} worked for {format_seconds(use.wall_s)} together, {doing} and {format_share(use.idle_fraction)} "
        f"({format_seconds(use.idle_s)}) neither{_mostly(use)}{pace}{memory}.{lost}"
    ]


def format_cores(cores: float | None) -> str:
    """Returns how many processors were in use on average: `1.8`."""
    return UNKNOWN if cores is None else f"{cores:.1f}"


def worker_cells(worker: WorkerUse) -> list[object]:
    """Returns a worker's line of `workers.csv`."""
    return [getattr(worker, name) for name in COLUMNS]


def _mostly(use: ClusterUse) -> str:
    """What most of the idle time went to, where that can be said."""
    spent = {name: sum(getattr(worker, key) or 0.0 for worker in use.workers) for key, name in NAMES.items()}
    most = max(spent, key=lambda name: spent[name])
    return f", most of that {most}" if 2 * spent[most] > use.idle_s > 0 else ""


def _use(row: WorkerRow) -> WorkerUse:
    said = {name: value for name, value in row.telemetry.items() if 0 <= value <= MOST}.get
    wall_s, idle = said("wall_s"), said("idle_fraction")
    cpu_s = said("cpu_s")
    idle = None if idle is None else min(idle, 1.0)
    return WorkerUse(
        worker=row.id,
        host=row.host,
        device=row.device,
        job=row.job,
        status=row.status,
        started_at=row.started_at,
        ended_at=row.ended_at,
        trials=row.done,
        wall_s=wall_s,
        training_s=said("training_s"),
        evaluating_s=said("evaluating_s"),
        loading_s=said("loading_s"),
        saving_s=said("saving_s"),
        storage_s=said("storage_s"),
        waiting_s=said("waiting_s"),
        idle_s=None if wall_s is None or idle is None else wall_s * idle,
        idle_fraction=idle,
        trained_tokens=said("trained_tokens"),
        tokens_per_s=said("tokens_per_s"),
        peak_memory_bytes=said("peak_memory_bytes"),
        cores_used=cpu_s / wall_s if cpu_s is not None and wall_s else None,
        gpu_use_fraction=_mean(_of_gpus(row, "use_fraction")),
        gpu_peak_memory_bytes=max(_of_gpus(row, "peak_memory_bytes"), default=None),
        reason=row.reason,
    )


def _of_gpus(row: WorkerRow, name: str) -> list[float]:
    found = {key: value for key, value in row.telemetry.items() if key.startswith("gpu") and key.endswith(f"_{name}")}
    return [value for value in found.values() if 0 <= value <= MOST]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(seconds: Sequence[float | None], wall_s: float) -> float | None:
    return sum(value or 0.0 for value in seconds) / wall_s if wall_s > 0 else None
