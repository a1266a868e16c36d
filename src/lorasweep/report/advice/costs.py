"""The share of full fine-tuning's gain that an arm keeps, and its share of the parameters, bytes, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lorasweep.record import RunRecord
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import format_share, format_share_estimate, join_words


@dataclass(frozen=True, kw_only=True)
class KeptGain:
    """One arm compared with full fine-tuning. Each ratio is the arm's cost over full fine-tuning's.

    Costs are means over the finished reruns, or those of the best trial if there are none.
    """

    arm: str
    full: str
    share_of_gain: float
    """(base - arm) / (base - full)."""
    share_interval: Interval | None
    """The 95 % interval; None without a confirm stage on two seeds."""
    is_confirmed: bool
    """Whether the share is that of test data; else it is that of one seed on validation data."""
    params_ratio: float | None
    bytes_ratio: float | None
    memory_ratio: float | None
    time_ratio: float | None
    is_packed: bool
    """Whether runs of the arm trained in a pack: their memory is the pack's, their time a share of the pack's."""

    @property
    def sentence(self) -> str:
        """The comparison in words."""
        ratios = {
            "trainable parameters": self.params_ratio,
            "bytes on disk": self.bytes_ratio,
            "peak memory": self.memory_ratio,
            "time": self.time_ratio,
        }
        costs = join_words(
            [f"{format_share(ratio)} of its {name}" for name, ratio in ratios.items() if ratio is not None]
        )
        share = format_share_estimate(self.share_of_gain, self.share_interval)
        seed = "" if self.is_confirmed else " (one seed, validation data)"
        packed = "; its memory is that of a pack of runs, its time a share of the pack's" if self.is_packed else ""
        at_costs = f" at {costs}{packed}" if costs else ""
        return f"`{self.arm}` keeps {share} of full fine-tuning's gain{seed}{at_costs}."


def compare_costs(data: SweepData) -> list[KeptGain]:
    """Returns each arm's share of full fine-tuning's gain and costs, if the frozen base and full have scores."""
    full = next((arm for arm in data.arms if arm.name == data.evidence.full), data.best_arm("full"))
    if full is None:
        return []
    others = [arm for arm in data.arms if arm.row.method not in ("frozen", "full")]
    return [kept for arm in others if (kept := _compare(arm, full, data))]


def _compare(arm: ArmData, full: ArmData, data: SweepData) -> KeptGain | None:
    found = data.evidence.arm(arm.name)
    confirmed = found.share_of_full_gain if found else None
    share = confirmed if confirmed is not None else data.share_of_full_gain(arm.best.value if arm.best else None)
    if share is None:
        return None
    own, full_runs = _find_runs(arm), _find_runs(full)
    return KeptGain(
        arm=arm.name,
        full=full.name,
        share_of_gain=share,
        share_interval=found.share_interval if found and confirmed is not None else None,
        is_confirmed=confirmed is not None,
        params_ratio=_ratio(own, full_runs, "trainable_params"),
        bytes_ratio=_ratio(own, full_runs, "adapter_bytes"),
        memory_ratio=_ratio(own, full_runs, "peak_memory_bytes"),
        time_ratio=_ratio(own, full_runs, "wall_s"),
        is_packed=any(record.pack for record in own),
    )


def _find_runs(arm: ArmData) -> list[RunRecord]:
    """Returns the runs that measure an arm's cost: the finished reruns of its winner, else its best trial."""
    reruns = [rerun.record for rerun in arm.reruns if rerun.state == "complete" and rerun.record]
    return reruns or ([arm.best.record] if arm.best and arm.best.record else [])


def _ratio(own: Sequence[RunRecord], full: Sequence[RunRecord], name: str) -> float | None:
    below = fmean(getattr(record, name) for record in full) if full else 0.0
    return fmean(getattr(record, name) for record in own) / below if own and below > 0 else None
