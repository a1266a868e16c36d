"""The evidence of one sweep: the results of its arms, and a verdict on every pair of arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from lorasweep.report.evidence.estimates import CONFIDENCE, Estimate, Interval, estimate_ratio, estimate_sum
from lorasweep.report.evidence.scores import ConfirmScores

Verdict = Literal["better", "worse", "not distinguishable", "not tested"]
LEVEL = 1 - CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class ArmEvidence:
    """The results of one arm's reruns on test data."""

    name: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    """The score of each seed."""
    mean: float
    std: float | None
    """The standard deviation over seeds; None for one seed."""
    interval: Interval | None
    """The 95 % interval of the mean: t over seeds, and a bootstrap over examples if they are known."""
    seed_interval: Interval | None
    """The 95 % interval over seeds alone: the mean of other trainings on the same test data."""
    uses_examples: bool
    share_of_full_gain: float | None
    """(base - arm) / (base - full) on test data."""
    share_interval: Interval | None


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


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The results of the confirm stage; without arms if there was none."""

    arms: tuple[ArmEvidence, ...] = ()
    pairs: tuple[PairComparison, ...] = ()
    num_examples: int = 0
    """The number of test examples behind the intervals; 0 if no scores of single examples are known."""
    base: str | None = None
    """The name of the arm that is the frozen base."""
    full: str | None = None
    """The name of the best arm of full fine-tuning."""
    notes: tuple[str, ...] = ()
    """One sentence for each limit of the numbers."""

    def arm(self, name: str | None) -> ArmEvidence | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def pair(self, first: str, second: str | None) -> PairComparison | None:
        """Returns the comparison of two arms, seen from the first."""
        found = next((pair for pair in self.pairs if {pair.first, pair.second} == {first, second}), None)
        return found.seen_from(first) if found else None

    @property
    def num_compared(self) -> int:
        return sum(pair.verdict != "not tested" for pair in self.pairs)


def compare_arms(scores: ConfirmScores, methods: Sequence[tuple[str, str]], *, sign: int) -> Evidence:
    """Returns the results of the confirm stage.

    Args:
        scores: The scores of the confirm stage.
        methods: The name and method of every arm.
        sign: 1 if lower scores are better, else -1.
    """
    names = [name for name, _ in methods if scores.values.get(name)]
    base, full = (_find_best(method, methods, scores, sign=sign) for method in ("frozen", "full"))
    return Evidence(
        arms=tuple(arm for name in names if (arm := _estimate_arm(scores, name, base, full, sign=sign))),
        pairs=compare_pairs(scores, names, sign=sign),
        num_examples=scores.num_examples,
        base=base,
        full=full,
        notes=(*_describe_limits(scores, names), *scores.problems),
    )


def compare_pairs(scores: ConfirmScores, arms: Sequence[str], *, sign: int) -> tuple[PairComparison, ...]:
    """Returns a verdict on every pair of arms; `sign` is 1 if lower scores are better, else -1.

    All pairs are one family, so that a reader may pick out any pair afterwards, also those of the best arm.
    """
    pairs = list(combinations([arm for arm in arms if scores.values.get(arm)], 2))
    estimates = [estimate_sum(scores, {first: 1.0, second: -1.0}) for first, second in pairs]
    p_values = [e.distribution.p_value if e and e.distribution and e.is_testable else None for e in estimates]
    adjusted = iter(adjust_holm([p for p in p_values if p is not None]))
    return tuple(
        _judge(pair, estimate, p_value, None if p_value is None else next(adjusted), sign=sign)
        for pair, estimate, p_value in zip(pairs, estimates, p_values, strict=True)
    )


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted by Holm's step-down procedure (1979), in the order given.

    The k-th smallest of m is multiplied by m - k + 1 and is never below the one before it. The procedure is valid
    whatever the dependence of the tests; pairs that share arms, seeds and examples are dependent.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _judge(
    pair: tuple[str, str], estimate: Estimate | None, p_value: float | None, adjusted: float | None, *, sign: int
) -> PairComparison:
    verdict: Verdict = "not tested"
    reason = None
    if estimate is None:
        reason = "they have no seed in common"
    elif adjusted is None:
        reason = "they have one seed in common, which says nothing about another"
    elif adjusted < LEVEL:
        verdict = "better" if sign * estimate.value < 0 else "worse"
    else:
        verdict = "not distinguishable"
    return PairComparison(
        first=pair[0],
        second=pair[1],
        verdict=verdict,
        difference=estimate.value if estimate else None,
        interval=estimate.interval if estimate else None,
        p_value=p_value,
        adjusted_p_value=adjusted,
        num_seeds=len(estimate.seeds) if estimate else 0,
        uses_examples=estimate.uses_examples if estimate else False,
        reason=reason,
    )


def _find_best(method: str, methods: Sequence[tuple[str, str]], scores: ConfirmScores, *, sign: int) -> str | None:
    found = [(name, estimate_sum(scores, {name: 1.0})) for name, kind in methods if kind == method]
    means = {name: sign * estimate.value for name, estimate in found if estimate}
    return min(means, key=means.__getitem__, default=None)


def _estimate_arm(
    scores: ConfirmScores, name: str, base: str | None, full: str | None, *, sign: int
) -> ArmEvidence | None:
    estimate = estimate_sum(scores, {name: 1.0})
    seeds_alone = estimate_sum(replace(scores, deviations={}, num_examples=0), {name: 1.0})
    if estimate is None or seeds_alone is None:
        return None
    share, share_interval = _estimate_share(scores, name, base, full, sign=sign)
    return ArmEvidence(
        name=name,
        seeds=tuple(sorted(scores.values[name])),
        values=tuple(value for _, value in sorted(scores.values[name].items())),
        mean=estimate.value,
        std=estimate.std,
        interval=estimate.interval,
        seed_interval=seeds_alone.interval,
        uses_examples=estimate.uses_examples,
        share_of_full_gain=share,
        share_interval=share_interval,
    )


def _estimate_share(
    scores: ConfirmScores, name: str, base: str | None, full: str | None, *, sign: int
) -> tuple[float | None, Interval | None]:
    """Returns an arm's share of full fine-tuning's gain with its interval; None if there is no such gain."""
    gain = estimate_sum(scores, {base: float(sign), full: -float(sign)}) if base and full else None
    if base is None or full is None or gain is None or gain.value <= 0:
        return None, None
    if name in (base, full):  # 0 and 1 by definition, without error
        return float(name == full), None
    return estimate_ratio(scores, {base: 1.0, name: -1.0}, {base: 1.0, full: -1.0}) or (None, None)


def _describe_limits(scores: ConfirmScores, names: Sequence[str]) -> list[str]:
    notes = []
    single = [name for name in names if name not in scores.deterministic and len(scores.values[name]) == 1]
    if single:
        listed = ", ".join(f"`{name}`" for name in single)
        notes.append(f"One seed says nothing about another: there is no verdict on {listed}. Confirm on two or more.")
    if names and not scores.num_examples:
        notes.append("Single test examples have no scores here, so intervals are over seeds alone, on this test data.")
    return notes
