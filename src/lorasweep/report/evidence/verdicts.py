"""The evidence of one sweep: the results of its arms, and a verdict on every pair of arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from scipy.special import stdtrit

from lorasweep.config.sweep import MIN_RELIABLE_SEEDS, Margin
from lorasweep.report.evidence.equivalence import (
    EQUIVALENCE_LEVEL,
    FurtherEvidence,
    MeasuredMargin,
    estimate_slack,
    measure_margin,
    project_seeds,
)
from lorasweep.report.evidence.estimates import CONFIDENCE, Estimate, Interval, estimate_ratio, estimate_sum
from lorasweep.report.evidence.ranks import RankVerdict, choose_rank
from lorasweep.report.evidence.scores import ConfirmScores
from lorasweep.wording import join_words

Verdict = Literal["better", "worse", "equivalent", "inconclusive", "not tested"]
"""The words of every output: terminal, page, CSV, JSON and TensorBoard."""
LEVEL = 1 - CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class ArmEvidence:
    """The results of one arm's confirm runs on test data."""

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
    """The p value adjusted by Holm's procedure. Better and worse mean less than 0.05."""
    equivalence_p_value: float | None
    """The larger p value of the two one-sided tests against the margin. Equivalent means less than 0.05."""
    num_seeds: int
    uses_examples: bool
    reason: str | None = None
    """Why the pair was not tested."""
    settled_by: FurtherEvidence | None = None
    """The evidence that would probably settle an inconclusive pair."""

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
    num_groups: int = 0
    """The number of groups of these examples, such as documents; `num_examples` if each example is a group."""
    base: str | None = None
    """The name of the arm that is the frozen base."""
    full: str | None = None
    """The name of the best arm of full fine-tuning."""
    margin: float | None = None
    """The smallest difference that matters, in the metric's unit; None if it is a share of a gain that is not known."""
    ranks: tuple[RankVerdict, ...] = ()
    """The sufficient rank in each group of arms that differ in rank alone; empty without a margin."""
    warnings: tuple[str, ...] = ()
    """One sentence for the arms with one seed, and one for those with two."""
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


def compare_arms(
    scores: ConfirmScores,
    methods: Sequence[tuple[str, str]],
    *,
    sign: int,
    margin: Margin,
    rank_groups: Sequence[Mapping[float, str]] = (),
) -> Evidence:
    """Returns the results of the confirm stage.

    Args:
        scores: The scores of the confirm stage.
        methods: The name and method of every arm.
        sign: 1 if lower scores are better, else -1.
        margin: The margin as it was stated before the sweep.
        rank_groups: Per group of arms that differ in rank alone, the arm of each rank.
    """
    names = [name for name, _ in methods if scores.values.get(name)]
    base, full = (_find_best(method, methods, scores, sign=sign) for method in ("frozen", "full"))
    measured = measure_margin(scores, margin, base=base, full=full, sign=sign)
    return Evidence(
        arms=tuple(arm for name in names if (arm := _estimate_arm(scores, name, base, full, sign=sign))),
        pairs=compare_pairs(scores, names, sign=sign, margin=measured),
        num_examples=scores.num_examples,
        num_groups=scores.num_groups,
        base=base,
        full=full,
        margin=measured.value if measured else None,
        ranks=tuple(
            found for group in rank_groups if measured and (found := choose_rank(scores, group, measured, sign=sign))
        ),
        warnings=tuple(_warn_of_few_seeds(scores, names)),
        notes=(*_describe_limits(scores, names), *scores.problems),
    )


def compare_pairs(
    scores: ConfirmScores, arms: Sequence[str], *, sign: int, margin: MeasuredMargin | None = None
) -> tuple[PairComparison, ...]:
    """Returns a verdict on every pair of arms; `sign` is 1 if lower scores are better, else -1.

    All pairs are one family, so that a reader may pick out any pair afterwards, also those of the best arm.
    """
    pairs = list(combinations([arm for arm in arms if scores.values.get(arm)], 2))
    estimates = [estimate_sum(scores, {first: 1.0, second: -1.0}) for first, second in pairs]
    p_values = [e.tested.p_value if e and e.tested else None for e in estimates]
    adjusted = adjust_holm([p for p in p_values if p is not None])
    remaining = iter(adjusted)
    # Holm's procedure tests the next pair at this level.
    next_level = LEVEL / max(sum(p >= LEVEL for p in adjusted), 1)
    return tuple(
        _judge(
            pair,
            estimate,
            None if p_value is None else next(remaining),
            [estimate_slack(scores, *names, margin, sign=sign) for names in (pair, pair[::-1])] if margin else [],
            level=next_level,
            sign=sign,
        )
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
    pair: tuple[str, str],
    estimate: Estimate | None,
    adjusted: float | None,
    slacks: Sequence[Estimate | None],
    *,
    level: float,
    sign: int,
) -> PairComparison:
    """Returns the verdict on a pair.

    Args:
        pair: The names of both arms.
        estimate: First less second.
        adjusted: The p value of the difference, adjusted for all pairs; None if it can't be tested.
        slacks: The margin less the amount by which one arm is worse than the other, for both directions; empty
            without a margin.
        level: The level of the next test of a difference, for the projection.
        sign: 1 if lower scores are better, else -1.
    """
    tests = [slack.tested.p_positive if slack and slack.tested else 1.0 for slack in slacks]
    equivalence = max(tests) if tests and adjusted is not None else None
    verdict: Verdict = "inconclusive"
    reason = settled_by = None
    if estimate is None:
        verdict, reason = "not tested", "they have no seed in common"
    elif adjusted is None:
        verdict, reason = "not tested", "they have one seed in common, which says nothing about another"
    # Equivalence goes first: a difference below the margin does not matter, even if its sign is known.
    elif equivalence is not None and equivalence < EQUIVALENCE_LEVEL:
        verdict = "equivalent"
    elif adjusted < LEVEL:
        verdict = "better" if sign * estimate.value < 0 else "worse"
    else:
        settled_by = _project(estimate, slacks, level=level)
    return PairComparison(
        first=pair[0],
        second=pair[1],
        verdict=verdict,
        difference=estimate.value if estimate else None,
        interval=estimate.interval if estimate else None,
        p_value=estimate.tested.p_value if estimate and estimate.tested else None,
        adjusted_p_value=adjusted,
        equivalence_p_value=equivalence,
        num_seeds=len(estimate.seeds) if estimate else 0,
        uses_examples=estimate.uses_examples if estimate else False,
        reason=reason,
        settled_by=settled_by,
    )


def _project(estimate: Estimate, slacks: Sequence[Estimate | None], *, level: float) -> FurtherEvidence:
    """Returns the further evidence that would probably show a difference or an equivalence."""

    def power(num_seeds: int, *, uses_examples: bool) -> float:
        direction = 1.0 if estimate.value > 0 else -1.0
        difference = estimate.project_power(num_seeds, level=level / 2, sign=direction, uses_examples=uses_examples)
        if not slacks or None in slacks:
            return difference
        one_sided = [
            slack.project_power(num_seeds, level=EQUIVALENCE_LEVEL, uses_examples=uses_examples)
            for slack in slacks
            if slack
        ]
        # Both one-sided tests succeed with at least this probability.
        return max(difference, one_sided[0] + one_sided[1] - 1)

    return project_seeds(power, measured=len(estimate.seeds))


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
    if names and not scores.num_examples:
        return ["Single test examples have no scores here, so intervals are over seeds alone, on this test data."]
    return []


def _warn_of_few_seeds(scores: ConfirmScores, names: Sequence[str]) -> list[str]:
    """Returns a warning for the arms with one seed, and one for those with two."""
    trained = [name for name in names if name not in scores.deterministic]
    one, two = ([f"`{name}`" for name in trained if len(scores.values[name]) == count] for count in (1, 2))
    warnings = []
    if one:
        warnings.append(
            f"One seed says nothing about another: there is no verdict on {join_words(one)}. Confirm on "
            f"{MIN_RELIABLE_SEEDS} or more (`confirm.seeds`)."
        )
    if two:
        reach = [f"{stdtrit(count - 1, (1 + CONFIDENCE) / 2):.1f}" for count in (2, MIN_RELIABLE_SEEDS)]
        warnings.append(
            f"Two seeds say little: the interval over the seeds of {join_words(two)} reaches {reach[0]} standard "
            f"errors to each side, with {MIN_RELIABLE_SEEDS} seeds {reach[1]}. Confirm on {MIN_RELIABLE_SEEDS} or more "
            "(`confirm.seeds`)."
        )
    return warnings
