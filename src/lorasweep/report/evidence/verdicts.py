"""A verdict on every pair of arms, corrected for the number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from lorasweep.report.evidence.confidence import CONFIDENCE, ConfidenceDistribution
from lorasweep.report.evidence.estimates import Estimate, Interval, estimate_sum
from lorasweep.report.evidence.scores import ConfirmScores

Verdict = Literal["better", "worse", "not distinguishable", "not tested"]
LEVEL = 1 - CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class PairComparison:
    """Two arms compared on the same seeds and examples."""

    first: str
    second: str
    verdict: Verdict
    """How the first arm compares with the second."""
    difference: float | None
    """First less second, in the metric's unit."""
    interval: Interval | None
    """The 95 % interval of this difference alone, not corrected."""
    p_value: float | None
    """The two-sided p value of this pair alone."""
    adjusted_p_value: float | None
    """The p value adjusted by Holm's procedure. The verdict is made at 0.05."""
    minimum_detectable: float | None
    """The minimum detectable difference: detected in 80 % of cases at the level at which Holm's procedure stopped."""
    num_seeds: int
    uses_examples: bool
    reason: str | None = None
    """Why the pair was not tested."""

    def seen_from(self, name: str) -> PairComparison:
        """Returns the same comparison with the arm of that name first."""
        if name == self.first:
            return self
        turned: dict[Verdict, Verdict] = {"better": "worse", "worse": "better"}
        return replace(
            self,
            first=self.second,
            second=self.first,
            verdict=turned.get(self.verdict, self.verdict),
            difference=None if self.difference is None else -self.difference,
            interval=(-self.interval[1], -self.interval[0]) if self.interval else None,
        )


def compare_pairs(scores: ConfirmScores, arms: Sequence[str], *, sign: int) -> tuple[PairComparison, ...]:
    """Returns a verdict on every pair of arms.

    All pairs are one family, so that a reader may pick out any of them afterwards, the best arm's among them.

    Args:
        scores: The scores of the confirm stage.
        arms: The names of the arms, in the order in which they are paired.
        sign: 1 if lower scores are better, else -1.
    """
    pairs = list(combinations([arm for arm in arms if scores.values.get(arm)], 2))
    estimates = [estimate_sum(scores, {first: 1.0, second: -1.0}) for first, second in pairs]
    tested = [index for index, estimate in enumerate(estimates) if _tested(estimate)]
    p_values = [found.p_value for estimate in estimates if (found := _tested(estimate))]
    adjusted = dict(zip(tested, adjust_holm(p_values), strict=True))
    # Holm's procedure compares the pairs that are left when it stops with this level.
    level = LEVEL / max(1, sum(p >= LEVEL for p in adjusted.values()))
    return tuple(
        _judge(pair, estimates[index], adjusted.get(index), level=level, sign=sign) for index, pair in enumerate(pairs)
    )


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted by Holm's step-down procedure (1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1 and is never below the one before it. The procedure is valid
    whatever the dependence of the tests; pairs that share arms, seeds and examples are dependent.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _tested(estimate: Estimate | None) -> ConfidenceDistribution | None:
    """Returns the distribution of a difference that can be tested, else None."""
    return estimate.distribution if estimate and estimate.is_testable else None


def _judge(
    pair: tuple[str, str], estimate: Estimate | None, adjusted: float | None, *, level: float, sign: int
) -> PairComparison:
    verdict: Verdict = "not tested"
    tested, minimum, reason = _tested(estimate), None, None
    if estimate is None:
        reason = "they have no seed in common"
    elif tested is None or adjusted is None:
        reason = "they have one seed in common, which says nothing about another"
    elif adjusted < LEVEL:
        verdict = "better" if sign * estimate.value < 0 else "worse"
    else:
        verdict, minimum = "not distinguishable", tested.minimum_detectable(level)
    return PairComparison(
        first=pair[0],
        second=pair[1],
        verdict=verdict,
        difference=estimate.value if estimate else None,
        interval=estimate.interval if estimate else None,
        p_value=tested.p_value if tested else None,
        adjusted_p_value=adjusted,
        minimum_detectable=minimum,
        num_seeds=len(estimate.seeds) if estimate else 0,
        uses_examples=estimate.uses_examples if estimate else False,
        reason=reason,
    )
