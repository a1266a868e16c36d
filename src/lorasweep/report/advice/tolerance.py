"""How much worse than the best a trial may score and still be as good."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.special import stdtrit

from lorasweep.report.evidence.confidence import CONFIDENCE
from lorasweep.report.sweep_data import ArmData, SweepData, TrialData

GAIN_FRACTION = 0.02
"""Without a confirm stage, trials within this share of the arm's gain over the frozen base count as equally good."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How much worse than the best a trial may score and still count as equally good."""

    width: float
    """In the metric's unit."""
    source: str
    """The quantity behind the width, as a sentence names it."""
    is_measured: bool
    """Whether the width comes from the measured standard deviation over seeds."""


def find_tolerance(arm: ArmData, data: SweepData) -> Tolerance | None:
    """Returns the tolerance for an arm's trials; None if neither the confirm stage nor a frozen base gives one.

    With a confirm stage of n seeds and standard deviation s it is t · s · √2: the difference of two runs on one seed
    each exceeds that in 5 % of cases. s is that of test scores; validation scores are assumed to vary as much.
    """
    evidence = data.evidence.arm(arm.name)
    if evidence and evidence.std is not None and evidence.std > 0:
        quantile = float(stdtrit(len(evidence.seeds) - 1, (1 + CONFIDENCE) / 2))
        return Tolerance(width=quantile * evidence.std * 2**0.5, source="the noise between two seeds", is_measured=True)
    base = data.score_of("frozen")
    if base is None or arm.best is None or arm.best.value is None:
        return None
    gain = data.sign * (base - arm.best.value)
    source = f"{100 * GAIN_FRACTION:.0f} % of the gain over the frozen base"
    return Tolerance(width=GAIN_FRACTION * gain, source=source, is_measured=False) if gain > 0 else None


def near_best(arm: ArmData, data: SweepData, tolerance: Tolerance) -> list[TrialData]:
    """Returns an arm's complete trials that are as good as its best, the best among them."""
    if arm.best is None or arm.best.value is None:
        return []
    limit = data.sign * arm.best.value + tolerance.width
    return [t for t in arm.trials if t.is_complete and t.value is not None and data.sign * t.value <= limit]
