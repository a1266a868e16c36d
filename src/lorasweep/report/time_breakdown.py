"""The worker's time by activity, from the sweep's record."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.record import SweepRecord
from lorasweep.report.sweep_data import finite_number
from lorasweep.wording import format_bytes, format_count, format_seconds

ACTIVITIES = {
    "training_s": "training",
    "evaluating_s": "evaluating",
    "loading_s": "loading models and data",
    "saving_s": "saving",
    "storage_s": "proposing and storing trials",
}
"""The telemetry's keys of times that don't overlap, with the name of each activity. The rest of the time is `other`."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One activity of the worker."""

    name: str
    seconds: float
    fraction: float
    """The share of the worker's time, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class TimeBreakdown:
    """The worker's time by activity. None is a number that the record does not have."""

    device: str
    threads: int
    wall_s: float
    activities: tuple[Activity, ...]
    """The activities that took time. They add up to `wall_s`."""
    tokens_per_s: float | None
    """The training tokens per second of training time."""
    cores_used: float | None
    """The number of processor cores in use on average."""
    peak_memory_bytes: float | None
    gpu_peak_memory_bytes: float | None
    """The peak memory of the GPU that used most."""

    @property
    def sentence(self) -> str:
        """How long the worker ran, on which device, and what it used."""
        device = f" on {self.device}" if self.device else ""
        threads = f" with {self.threads} thread{'' if self.threads == 1 else 's'}" if self.threads > 0 else ""
        used = [
            *([f"{format_count(self.tokens_per_s)} tokens per second of training"] if self.tokens_per_s else []),
            *([f"{self.cores_used:.1f} processor cores on average"] if self.cores_used else []),
            *([f"at most {format_bytes(self.peak_memory_bytes)} of memory"] if self.peak_memory_bytes else []),
            *([f"at most {format_bytes(self.gpu_peak_memory_bytes)} on a GPU"] if self.gpu_peak_memory_bytes else []),
        ]
        measured = f" Measured: {'; '.join(used)}." if used else ""
        return f"The worker ran for {format_seconds(self.wall_s)}{device}{threads}.{measured}"


def break_down_time(record: SweepRecord) -> TimeBreakdown | None:
    """Returns the worker's time by activity; None if the record does not hold the worker's total time."""
    known = {key: number for key, value in record.telemetry.items() if (number := finite_number(value) or 0.0) > 0}
    wall_s, cpu_s = known.get("wall_s"), known.get("cpu_s")
    if wall_s is None:
        return None
    spent = {name: known.get(key, 0.0) for key, name in ACTIVITIES.items()}
    spent["other"] = max(0.0, wall_s - sum(spent.values()))
    tokens, training_s = known.get("trained_tokens"), known.get("training_s")
    return TimeBreakdown(
        device=record.device,
        threads=record.threads,
        wall_s=wall_s,
        activities=tuple(
            Activity(name=name, seconds=seconds, fraction=min(1.0, seconds / wall_s))
            for name, seconds in spent.items()
            if seconds > 0
        ),
        tokens_per_s=tokens / training_s if tokens and training_s else None,
        cores_used=cpu_s / wall_s if cpu_s else None,
        peak_memory_bytes=known.get("peak_memory_bytes"),
        gpu_peak_memory_bytes=known.get("gpu_peak_memory_bytes"),
    )
