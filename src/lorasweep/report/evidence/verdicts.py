"""A verdict on every pair of arms, corrected for how many were compared. Comes after `estimates`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from lorasweep.report.evidence.confidence import CONFIDENCE
from lorasweep.report.evidence.estimates import Estimate, Interval, estimate_sum
from lorasweep.report.evidence.scores import ConfirmScores

Verdict = Literal["better", "worse", "not distinguishable", "not tested"]
LEVEL = 1 - CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two arms on the same seeds and examples."""

    first: str
    second: str
    verdict: Verdict
    """Of the first against the second."""
    difference: float | None
    """First less second, in the metric's unit."""
    interval: Interval | None
    """95 % interval of this difference alone, not corrected."""
    p_value: float | None
    """Two-sided, of this pair alone."""
    adjusted_p_value: float | None
    """By Holm's procedure; the verdict is made at 0.05."""
    smallest_visible: float | None
    """Smallest difference that would have been seen in 80 of 100 cases, at the level where Holm's procedure stopped."""
    num_seeds: int
    uses_examples: bool
    reason: str | None = None
    """Why the pair was not tested."""

    def seen_from(self, name: str) -> Pair:
        """Returns the same pair with the arm of that name first."""
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


def compare_pairs(scores: ConfirmScores, arms: Sequence[str], *, sign: int) -> tuple[Pair, ...]:
    """Returns the verdict on every pair of arms.

    All pairs are one family, so that a reader may pick out any of them afterwards, the best arm's among them.

    Args:
        scores: The confirm stage.
        arms: Names, in the order in which they are paired.
        sign: 1 where lower scores are better, else -1.
    """
    pairs = list(combinations([arm for arm in arms if scores.values.get(arm)], 2))
    found = [estimate_sum(scores, {first: 1.0, second: -1.0}) for first, second in pairs]
    p_values = [_p_value(estimate) for estimate in found]
    adjusted = iter(adjust_holm([p for p in p_values if p is not None]))
    holm = [None if p is None else next(adjusted) for p in p_values]
    tested = [p for p in holm if p is not None]
    # what is left when the procedure stops is compared with this level
    level = LEVEL / max(1, sum(p >= LEVEL for p in tested))
    return tuple(
        _judge(pair, estimate, p, level=level, sign=sign) for pair, estimate, p in zip(pairs, found, holm, strict=True)
    )


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted by Holm's step-down procedure (1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1 and is never below the one before it. Holds whatever the
    dependence of the tests; pairs that share arms, seeds and examples are dependent.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _p_value(estimate: Estimate | None) -> float | None:
    testable = estimate is not None and estimate.is_testable and estimate.distribution is not None
    return estimate.distribution.p_value if testable and estimate and estimate.distribution else None


def _judge(
    pair: tuple[str, str], estimate: Estimate | None, adjusted: float | None, *, level: float, sign: int
) -> Pair:
    verdict: Verdict = "not tested"
    smallest = None
    if adjusted is not None and estimate and estimate.distribution:
        if adjusted < LEVEL:
            verdict = "better" if sign * estimate.value < 0 else "worse"
        else:
            verdict, smallest = "not distinguishable", estimate.distribution.smallest_visible(level)
    return Pair(
        first=pair[0],
        second=pair[1],
        verdict=verdict,
        difference=estimate.value if estimate else None,
        interval=estimate.interval if estimate else None,
        p_value=_p_value(estimate),
        adjusted_p_value=adjusted,
        smallest_visible=smallest,
        num_seeds=len(estimate.seeds) if estimate else 0,
        uses_examples=estimate.uses_examples if estimate else False,
        reason=_why_not_tested(estimate) if verdict == "not tested" else None,
    )


def _why_not_tested(estimate: Estimate | None) -> str:
    if estimate is None:
        return "they have no seed in common"
    return "they have one seed in common, which says nothing about another"
