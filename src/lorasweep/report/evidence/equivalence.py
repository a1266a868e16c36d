"""The margin: the smallest difference that matters. Tests against it, and the seeds that would settle a verdict."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorasweep.config.sweep import Margin
from lorasweep.report.evidence.estimates import Coefficients, Estimate, estimate_sum, subtract
from lorasweep.report.evidence.scores import ConfirmScores

EQUIVALENCE_LEVEL = 0.05
"""The level of each of the two one-sided tests (Schuirmann 1987)."""
POWER = 0.8
"""A number of seeds "would probably settle" a question if a test then succeeds with this probability."""
MAX_SEEDS = 1000
"""No projection names more seeds than this."""


@dataclass(frozen=True, kw_only=True)
class MeasuredMargin:
    """The margin `constant` + Σ coefficient · mean of the arm, in the metric's unit.

    A margin that is a share of full's gain keeps the arms, so that tests count the error of the gain too.
    """

    constant: float
    coefficients: Coefficients
    value: float
    """The estimated margin."""


def measure_margin(
    scores: ConfirmScores, margin: Margin, *, base: str | None, full: str | None, sign: int
) -> MeasuredMargin | None:
    """Returns the margin, or None if it is a share of full's gain and no positive gain was measured."""
    if not margin.is_share_of_gain:
        return MeasuredMargin(constant=margin.value, coefficients={}, value=margin.value)
    if base is None or full is None:
        return None
    coefficients = {base: sign * margin.value, full: -sign * margin.value}
    found = estimate_sum(scores, coefficients)
    if found is None or found.value <= 0:
        return None
    return MeasuredMargin(constant=0.0, coefficients=coefficients, value=found.value)


def estimate_slack(
    scores: ConfirmScores, first: str, second: str, margin: MeasuredMargin, *, sign: int
) -> Estimate | None:
    """Returns the margin less the amount by which `first` is worse than `second`; positive within the margin."""
    worse = {first: float(sign), second: -float(sign)}
    return estimate_sum(scores, subtract(margin.coefficients, worse, 1.0), constant=margin.constant)


@dataclass(frozen=True, kw_only=True)
class FurtherEvidence:
    """The evidence that would probably settle a question."""

    kind: Literal["seeds", "test examples", "too many seeds"]
    """`test examples`: the error over examples, which does not shrink with seeds, is too large alone.
    `too many seeds`: more than `MAX_SEEDS` seeds in all."""
    more_seeds: int | None = None
    """The number of further seeds of the kind `seeds`; None after one seed, which says nothing about others."""

    def describe(self, *, groups: str | None) -> str:
        """Returns the evidence in words, such as `7 more seeds`.

        `groups` is the name of the groups of test examples, such as `documents`; None if each example is a group.
        """
        if self.kind == "test examples":
            return f"more test examples in more {groups}" if groups else "more test examples"
        if self.kind == "too many seeds":
            return "no practical number of seeds"
        number = f"{self.more_seeds} " if self.more_seeds else ""
        return f"{number}more {'seed' if self.more_seeds == 1 else 'seeds'}"


def project_seeds(power: Callable[..., float], *, measured: int) -> FurtherEvidence:
    """Returns the further evidence that would probably settle a question.

    Args:
        power: Returns the probability of success with a number of seeds. With `uses_examples=False` it ignores the
            error over test examples, which does not shrink with seeds.
        measured: The number of seeds so far.
    """
    if measured == 1:  # the standard deviation over seeds is not known
        return FurtherEvidence(kind="seeds")
    counts = range(max(measured, 1) + 1, MAX_SEEDS + 1)
    # The probability rises with the number of seeds.
    index = bisect_left(counts, POWER, key=lambda count: power(count, uses_examples=True))
    if index < len(counts):
        return FurtherEvidence(kind="seeds", more_seeds=counts[index] - measured)
    is_too_few_examples = power(MAX_SEEDS, uses_examples=False) >= POWER
    return FurtherEvidence(kind="test examples" if is_too_few_examples else "too many seeds")
