"""How far two scores of one seed may lie apart by chance alone, and how arms that differ in rank belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from lorasweep.report.evidence.confidence import CONFIDENCE
from lorasweep.report.runs import finite_number
from lorasweep.report.tables import Arm, SweepData, Trial

RANK, ALPHA, LR = "method.rank", "method.alpha", "optim.lr"
GAIN_FRACTION = 0.02
"""Without a confirm stage, scores are called alike within this share of the arm's gain over the frozen base."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How much worse than the best a trial may score and still count as equally good."""

    width: float
    source: str
    """What the width is derived from, as the end of a sentence."""
    is_measured: bool
    """Whether the width comes from the measured spread over seeds."""


def tolerance_of(arm: Arm, data: SweepData) -> Tolerance | None:
    """Returns how far two trials of an arm may lie apart by chance; None where nothing tells.

    From the confirm stage's spread s over n seeds: t · s · √2, which the difference of two runs on one seed each
    exceeds in 5 of 100 cases. The spread is that of test scores; that of validation scores is taken to be the same.
    """
    evidence = data.evidence.arm(arm.name)
    if evidence and evidence.spread is not None and evidence.spread > 0:
        quantile = float(stdtrit(len(evidence.seeds) - 1, (1 + CONFIDENCE) / 2))
        return Tolerance(
            width=quantile * evidence.spread * 2**0.5, source="the noise between two seeds", is_measured=True
        )
    base = data.score_of("frozen")
    if base is None or arm.best is None or arm.best.value is None:
        return None
    gain = data.sign * (base - arm.best.value)
    source = f"{GAIN_FRACTION:.0%} of the gain over the frozen base".replace("%", " %")
    return Tolerance(width=GAIN_FRACTION * gain, source=source, is_measured=False) if gain > 0 else None


def near_best(arm: Arm, data: SweepData, tolerance: Tolerance) -> list[Trial]:
    """Returns an arm's complete trials that are as good as its best, the best among them."""
    if arm.best is None or arm.best.value is None:
        return []
    limit = data.sign * arm.best.value + tolerance.width
    return [t for t in arm.trials if t.is_complete and t.value is not None and data.sign * t.value <= limit]


def rank_of(arm: Arm) -> float | None:
    """Returns the rank of an arm that has one rank; None where it has none or sweeps it."""
    if RANK in arm.row.space:
        return None
    rank = finite_number(arm.row.settings.get(RANK))
    if rank is None and arm.winner:
        rank = arm.winner.number_at(RANK)
    return float(rank) if rank is not None and rank > 0 else None


def rank_groups(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Returns arms that differ in nothing but rank, by rising rank; groups of two or more."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if rank_of(arm) is not None:
            rest = {key: value for key, value in arm.row.settings.items() if key != RANK}
            groups.setdefault(f"{arm.row.method} {sorted(rest.items(), key=str)}", []).append(arm)
    found = [sorted(group, key=lambda arm: rank_of(arm) or 0.0) for group in groups.values()]
    return [group for group in found if len({rank_of(arm) for arm in group}) > 1]
