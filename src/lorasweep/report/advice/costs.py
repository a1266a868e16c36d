"""What share of full fine-tuning's gain an arm keeps, and at what share of its parameters, bytes, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lorasweep.record import RunRecord
from lorasweep.report.tables import Arm, SweepData
from lorasweep.wording import format_share, format_share_estimate, join_words


@dataclass(frozen=True, kw_only=True)
class KeptGain:
    """One arm beside full fine-tuning. Costs are means over the winners' reruns, else those of the best trials."""

    arm: str
    full: str
    share_of_gain: float
    """(base - arm) / (base - full)."""
    share_interval: tuple[float, float] | None
    """95 %; None without a confirm stage on two seeds."""
    is_confirmed: bool
    """Whether the share is that of test data; else of one seed on validation data."""
    params_ratio: float | None
    """The arm's over full fine-tuning's, and so on below."""
    bytes_ratio: float | None
    memory_ratio: float | None
    time_ratio: float | None
    is_packed: bool
    """Whether runs of the arm trained in a pack: their memory is the pack's, their time a share of it."""


def advise_costs(data: SweepData) -> list[KeptGain]:
    """Returns what each arm keeps of full fine-tuning's gain, where both ends of the scale are known."""
    full = next((arm for arm in data.arms if arm.name == data.evidence.full), data.best_arm("full"))
    if full is None:
        return []
    others = [arm for arm in data.arms if arm.row.method not in ("frozen", "full")]
    return [kept for arm in others if (kept := _keep(arm, full, data))]


def sentences_of(kept: Sequence[KeptGain]) -> list[str]:
    """Returns a sentence per arm."""
    return [_sentence(one) for one in kept]


def _keep(arm: Arm, full: Arm, data: SweepData) -> KeptGain | None:
    found = data.evidence.arm(arm.name)
    confirmed = found.share_of_full_gain if found else None
    share = confirmed if confirmed is not None else data.share_of_full_gain(arm.best.value if arm.best else None)
    if share is None:
        return None
    mine, theirs = costs_of(arm), costs_of(full)
    return KeptGain(
        arm=arm.name,
        full=full.name,
        share_of_gain=share,
        share_interval=found.share_interval if found and confirmed is not None else None,
        is_confirmed=confirmed is not None,
        params_ratio=_ratio(mine, theirs, "trainable_params"),
        bytes_ratio=_ratio(mine, theirs, "adapter_bytes"),
        memory_ratio=_ratio(mine, theirs, "peak_memory_bytes"),
        time_ratio=_ratio(mine, theirs, "wall_s"),
        is_packed=any(record.pack for record in mine),
    )


def costs_of(arm: Arm) -> list[RunRecord]:
    """Returns the runs that say what an arm costs: the finished reruns of its winner, else its best trial."""
    reruns = [rerun.record for rerun in arm.reruns if rerun.state == "complete" and rerun.record]
    best = [arm.best.record] if arm.best and arm.best.record else []
    return reruns or best


def _ratio(mine: Sequence[RunRecord], theirs: Sequence[RunRecord], name: str) -> float | None:
    below = fmean(getattr(record, name) for record in theirs) if theirs else 0.0
    return fmean(getattr(record, name) for record in mine) / below if mine and below > 0 else None


def _sentence(kept: KeptGain) -> str:
    parts = [
        (kept.params_ratio, "trainable parameters"),
        (kept.bytes_ratio, "bytes on disk"),
        (kept.memory_ratio, "peak memory"),
        (kept.time_ratio, "time"),
    ]
    costs = join_words([f"{format_share(ratio)} of its {name}" for ratio, name in parts if ratio is not None])
    share = format_share_estimate(kept.share_of_gain, kept.share_interval)
    seed = "" if kept.is_confirmed else " (one seed, validation data)"
    packed = "; its memory is that of a pack of runs, its time a share of the pack's" if kept.is_packed else ""
    return f"`{kept.arm}` keeps {share} of full fine-tuning's gain{seed}" + (f" at {costs}{packed}." if costs else ".")
