"""Where the worker's time went, from the sweep's record. Comes after `runs`, before `summary` and the page."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.record import SweepRecord
from lorasweep.report.runs import finite_number
from lorasweep.wording import format_bytes, format_count, format_seconds

ACTIVITIES = {
    "training_s": "training",
    "evaluating_s": "evaluating",
    "loading_s": "loading models and data",
    "saving_s": "saving",
    "storage_s": "proposing and storing trials",
}
"""Keys of the telemetry that add up to the worker's time, and what they are called; the rest is `OTHER`."""
OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Something that the worker spent time on."""

    name: str
    seconds: float
    fraction: float
    """Share of the worker's time, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class TimeUse:
    """Where the worker's time went. None is a number that the record does not have."""

    device: str
    threads: int
    wall_s: float
    activities: tuple[Activity, ...]
    """They add up to `wall_s`; activities that took no time are left out."""
    tokens_per_s: float | None
    """Training tokens per second of training time."""
    peak_memory_bytes: float | None
    cores_used: float | None
    """Processor cores in use on average."""
    gpu_peak_memory_bytes: float | None
    """Memory of the GPU of which it used most."""


def measure_time_use(record: SweepRecord) -> TimeUse | None:
    """Returns where the worker's time went; None if the record does not say how long it worked."""
    known = {key: number for key, value in record.telemetry.items() if (number := finite_number(value) or 0.0) > 0}
    wall_s, cpu_s = known.get("wall_s"), known.get("cpu_s")
    if wall_s is None:
        return None
    spent = {name: known.get(key, 0.0) for key, name in ACTIVITIES.items()}
    spent[OTHER] = max(0.0, wall_s - sum(spent.values()))
    tokens, training_s = known.get("trained_tokens"), known.get("training_s")
    return TimeUse(
        device=record.device,
        threads=record.threads,
        wall_s=wall_s,
        activities=tuple(
            Activity(name=name, seconds=seconds, fraction=min(1.0, seconds / wall_s))
            for name, seconds in spent.items()
            if seconds > 0
        ),
        tokens_per_s=tokens / training_s if tokens and training_s else None,
        peak_memory_bytes=known.get("peak_memory_bytes"),
        cores_used=cpu_s / wall_s if cpu_s else None,
        gpu_peak_memory_bytes=known.get("gpu_peak_memory_bytes"),
    )


def describe_time_use(use: TimeUse) -> str:
    """Returns how long the worker ran, where, and what it used, in one or two sentences."""
    device = f" on {use.device}" if use.device else ""
    threads = f" with {use.threads} thread{'' if use.threads == 1 else 's'}" if use.threads > 0 else ""
    used = [
        *([f"{format_count(use.tokens_per_s)} tokens per second of training"] if use.tokens_per_s else []),
        *([f"{use.cores_used:.1f} processor cores on average"] if use.cores_used else []),
        *([f"at most {format_bytes(use.peak_memory_bytes)} of memory"] if use.peak_memory_bytes else []),
        *([f"at most {format_bytes(use.gpu_peak_memory_bytes)} on a GPU"] if use.gpu_peak_memory_bytes else []),
    ]
    measured = f" Measured: {'; '.join(used)}." if used else ""
    return f"The worker ran for {format_seconds(use.wall_s)}{device}{threads}.{measured}"
