"""The smallest sufficient rank, by tests of non-inferiority."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

from lorasweep.report.evidence.equivalence import FurtherEvidence, MeasuredMargin, estimate_slack, project_seeds
from lorasweep.report.evidence.estimates import Estimate, estimate_sum
from lorasweep.report.evidence.scores import ConfirmScores

LEVEL = 0.025
"""The level of a one-sided test of non-inferiority: the usual one, at which the two-sided 95 % interval decides."""


@dataclass(frozen=True, kw_only=True)
class RankVerdict:
    """The smallest rank that is shown to be within the margin of every other rank, or the ranks that may be it."""

    rank: float | None
    """None if nothing is settled."""
    arm: str | None
    """The arm of `rank`."""
    best_rank: float
    """The rank with the best mean."""
    best_arm: str
    """The arm of `best_rank`."""
    compared: tuple[float, ...]
    """All ranks with scores."""
    left: tuple[float, ...]
    """The ranks that are not shown to be worse than another rank by more than the margin."""
    settled_by: FurtherEvidence | None
    """The evidence that would probably settle the rank; None if it is settled."""


def choose_rank(
    scores: ConfirmScores, arms: Mapping[float, str], margin: MeasuredMargin, *, sign: int
) -> RankVerdict | None:
    """Returns the smallest sufficient rank; None if fewer than two ranks have scores.

    A rank is shown to be sufficient if the 95 % interval of "how much worse it is than another rank, less the margin"
    lies below 0 for every other rank. The search starts at the rank with the best mean and steps down while the next
    lower rank is shown. To take the lowest rank that is shown instead, without stepping, would be wrong more often:
    every rank would be a new chance of a false result.

    Args:
        scores: The scores of the confirm stage.
        arms: The arm of each rank.
        margin: The margin.
        sign: 1 if lower scores are better, else -1.
    """
    means = {rank: found.value for rank, arm in arms.items() if (found := estimate_sum(scores, {arm: 1.0}))}
    if len(means) < 2:
        return None
    slacks = {
        (rank, other): estimate_slack(scores, arms[rank], arms[other], margin, sign=sign)
        for rank, other in permutations(means, 2)
    }
    sufficient = {rank: all(_is_positive(slacks[rank, other]) for other in means if other != rank) for rank in means}
    best = min(means, key=lambda rank: sign * means[rank])
    chosen = None
    for rank in sorted((rank for rank in means if rank <= best), reverse=True):
        if not sufficient[rank]:
            break
        chosen = rank
    excluded = {rank for (rank, _), slack in slacks.items() if _is_negative(slack)}
    return RankVerdict(
        rank=chosen,
        arm=None if chosen is None else arms[chosen],
        best_rank=best,
        best_arm=arms[best],
        compared=tuple(sorted(means)),
        left=tuple(sorted(means.keys() - excluded)),
        settled_by=None if chosen is not None else _project([slacks[best, other] for other in means if other != best]),
    )


def _is_positive(slack: Estimate | None) -> bool:
    return slack is not None and slack.tested is not None and slack.tested.p_positive < LEVEL


def _is_negative(slack: Estimate | None) -> bool:
    return slack is not None and slack.tested is not None and slack.tested.p_negative < LEVEL


def _project(slacks: list[Estimate | None]) -> FurtherEvidence:
    """Returns the further evidence that would probably show that all of these are positive."""
    known = [slack for slack in slacks if slack]

    def power(num_seeds: int, *, uses_examples: bool) -> float:
        powers = [slack.project_power(num_seeds, level=LEVEL, uses_examples=uses_examples) for slack in known]
        # All tests succeed with at least this probability, whatever their dependence (Bonferroni).
        return 1 - sum(1 - one for one in powers)

    return project_seeds(power, measured=max((len(slack.seeds) for slack in known), default=1))
