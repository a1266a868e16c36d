"""Weighted sums of the mean scores of subjects, with their errors over seeds and over groups of test examples.

All subjects of a sum are taken on the same seeds and the same examples, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit

from lorasweep.report.evidence.scores import ConfirmScores

CONFIDENCE = 0.95
MAX_DOUBLINGS = 30

Interval = tuple[float, float]
Coefficients = Mapping[str, float]
"""The weight of each subject in a sum."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A sum of mean scores, and the parts of its variance.

    Runs with other seeds and other groups of examples would give other scores. The variance is that of two crossed
    random effects (Cameron, Gelbach and Miller 2011, equation 2.8): seeds + groups - interaction. The interaction is
    subtracted once, because both other parts contain it.
    """

    value: float
    seeds: tuple[int, ...]
    """The seeds that all subjects of the sum have."""
    values: tuple[float, ...]
    """The sum for each seed."""
    seeds_variance: float
    """Variance of the mean over seeds; 0 for one seed."""
    groups_variance: float
    """Variance of the mean over groups of examples; 0 if examples are not known."""
    interaction_variance: float
    search_variance: float
    """Variance because the search may have missed the best settings; 0 for numbers on the settings themselves."""
    num_groups: int
    bounds: Interval
    """The lowest and the highest possible value of the sum."""

    @property
    def is_testable(self) -> bool:
        """Whether the error over seeds is known."""
        return len(self.seeds) > 1

    @property
    def error(self) -> float:
        """The standard error."""
        total = self.seeds_variance + self.groups_variance - self.interaction_variance
        # the estimate of the interaction may be too large, which would make the total too small or negative
        return math.sqrt(max(total, self.seeds_variance, self.groups_variance) + self.search_variance)

    @property
    def p_positive(self) -> float:
        """The p value of the one-sided test that shows a positive true value; 1 if the error is not known."""
        return self._compute_p_value(self.value)

    @property
    def p_negative(self) -> float:
        """The p value of the one-sided test that shows a negative true value; 1 if the error is not known."""
        return self._compute_p_value(-self.value)

    def _compute_p_value(self, value: float) -> float:
        if not self.is_testable:
            return 1.0
        if self.error == 0:
            return 0.0 if value > 0 else 1.0
        return self._compute_tail(value / self.error)

    def _compute_tail(self, deviation: float) -> float:
        """Returns the probability that the estimate is above its true value by at least `deviation` standard errors.

        It is the mean of the parts' t distributions, weighted by their variances. Satterthwaite's degrees of freedom
        are too many where three seeds have, by chance, nearly equal scores: simulated with 3 seeds and 60 groups, tests
        at a level of 0.35 % then were wrong 3.9 times as often as they may be, and with this mean 0.9 times.
        """
        parts = self._list_parts()
        return sum(variance * float(stdtr(count, -deviation)) for variance, count in parts) / sum(v for v, _ in parts)

    def _list_parts(self) -> list[tuple[float, float]]:
        """Returns the variances above 0 with their degrees of freedom."""
        parts = [
            (self.seeds_variance, len(self.seeds) - 1),
            (self.groups_variance, self.num_groups - 1),
            (self.search_variance, math.inf),
        ]
        return [(variance, count) for variance, count in parts if variance > 0]

    def find_interval(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Returns the two-sided interval, cut at `bounds`; None if nothing is known about the error."""
        if not self.is_testable and not self.groups_variance:
            return None
        reach = self.error * self._find_deviation((1 - confidence) / 2) if self.error else 0.0
        low, high = np.clip((self.value - reach, self.value + reach), *self.bounds)
        return float(low), float(high)

    def _find_deviation(self, level: float) -> float:
        """Returns the number of standard errors that the estimate's deviation exceeds with probability `level`."""
        ends = [-float(stdtrit(count, level)) for _, count in self._list_parts()]
        if max(ends) == min(ends):
            return ends[0]
        # 1 % wider, because the ends are not exact if a part is nearly 0
        low, high = 0.99 * min(ends), 1.01 * max(ends)
        return float(brentq(lambda deviation: self._compute_tail(deviation) - level, low, high, xtol=1e-9))

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.value, "std": self.std, "interval": self.find_interval(), "seeds": len(self.seeds)}

    @property
    def std(self) -> float | None:
        """The standard deviation over seeds."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def project(self, *, num_seeds: int | None = None, groups_factor: float = 1.0) -> Estimate:
        """Returns the estimate as it would be with more seeds or `groups_factor` times as many groups of examples."""
        count = len(self.seeds)
        ratio = count / (num_seeds or count)
        # the interaction is averaged over seeds and groups; the rest of each part is averaged over one of them
        pure_seeds = max(self.seeds_variance - self.interaction_variance, 0.0) * ratio
        pure_groups = max(self.groups_variance - self.interaction_variance, 0.0) / groups_factor
        both = self.interaction_variance * ratio / groups_factor
        return replace(
            self,
            seeds=tuple(range(num_seeds or count)),
            seeds_variance=pure_seeds + both,
            groups_variance=pure_groups + both,
            interaction_variance=both,
            num_groups=round(self.num_groups * groups_factor),
        )


def estimate_sum(
    scores: ConfirmScores, coefficients: Coefficients, *, constant: float = 0.0, adds_search_error: bool = False
) -> Estimate | None:
    """Returns constant + Σ coefficient · mean of the subject, over the seeds that all subjects have.

    Returns None if there is no such seed. `adds_search_error` estimates the sum for each subject's best settings: the
    error then includes that of the search, which may have missed them.
    """
    if any(not scores.values.get(subject) for subject in coefficients):
        return None
    seeds = sorted(set.intersection(*(set(scores.values[subject]) for subject in coefficients)))
    if not seeds:
        return None
    sums = np.full((len(seeds), len(scores.shares)), constant)
    for subject, coefficient in coefficients.items():
        if coefficient:  # 0 · infinity is not a number
            sums += coefficient * np.array([scores.values[subject][seed] for seed in seeds])
    errors = {subject: scores.search_errors.get(subject, 0.0) if adds_search_error else 0.0 for subject in coefficients}
    shares, (num_seeds, num_groups) = scores.shares, sums.shape
    by_seed, by_group = sums @ shares, sums.mean(axis=0)
    mean = float(by_seed.mean())
    seeds_variance = float(by_seed.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    groups_variance = interaction = 0.0
    if num_groups > 1:
        # The variance of a ratio of sums over groups that are drawn with their weights (Cochran 1977, section 6.3).
        correction = num_groups / (num_groups - 1)
        groups_variance = correction * float(((shares * (by_group - mean)) ** 2).sum())
        if num_seeds > 1:
            rest = sums - by_group[None] - by_seed[:, None] + mean
            interaction = correction * float(((shares[None] * rest) ** 2).sum()) / (num_seeds * (num_seeds - 1))
    return Estimate(
        value=mean,
        seeds=tuple(seeds),
        values=tuple(map(float, by_seed)),
        seeds_variance=seeds_variance,
        groups_variance=groups_variance,
        interaction_variance=min(interaction, seeds_variance, groups_variance),
        search_variance=sum((coefficients[subject] * error) ** 2 for subject, error in errors.items()),
        num_groups=scores.num_groups,
        bounds=_bound_sum(coefficients, scores.score_range, constant=constant),
    )


def estimate_ratio(
    scores: ConfirmScores,
    numerator: Coefficients,
    denominator: Coefficients,
    *,
    confidence: float = CONFIDENCE,
    adds_search_error: bool = False,
) -> tuple[float, Interval | None] | None:
    """Returns a ratio of two sums with its interval by Fieller's theorem (1954); None if a sum is not known.

    The interval holds each value for which a test of numerator - value · denominator = 0 does not reject. It is None
    if a test of denominator = 0 does not reject: the interval would have no bounds.
    """

    def estimate_difference(factor: float, first: Coefficients, second: Coefficients) -> Estimate | None:
        # With factor 0, the subjects of `second` still restrict the seeds, so that all sums have the same seeds.
        return estimate_sum(scores, subtract(first, second, factor), adds_search_error=adds_search_error)

    above = estimate_difference(0.0, numerator, denominator)
    below = estimate_difference(0.0, denominator, numerator)
    if above is None or below is None or below.value == 0:
        return None
    ratio, level = above.value / below.value, (1 - confidence) / 2
    if min(below.p_positive, below.p_negative) > level:
        return ratio, None

    def compute_p_minus_level(value: float) -> float:
        found = estimate_difference(value, numerator, denominator)
        return min(found.p_positive, found.p_negative) - level if found else 1.0

    def find_end(direction: int) -> float | None:
        """Returns the end of the interval below (-1) or above (1) the ratio, or None if it is not found."""
        width = 0.05
        for _ in range(MAX_DOUBLINGS):
            if compute_p_minus_level(ratio + direction * width) < 0:
                ends = sorted((ratio, ratio + direction * width))
                return float(brentq(compute_p_minus_level, *ends, xtol=1e-9))
            width *= 2
        return None

    low, high = find_end(-1), find_end(1)
    return ratio, None if low is None or high is None else (low, high)


def subtract(numerator: Coefficients, denominator: Coefficients, factor: float) -> dict[str, float]:
    """Returns the coefficients of numerator - factor · denominator."""
    subjects = dict.fromkeys([*numerator, *denominator])
    return {name: numerator.get(name, 0.0) - factor * denominator.get(name, 0.0) for name in subjects}


def _bound_sum(coefficients: Coefficients, score_range: Interval, *, constant: float) -> Interval:
    """Returns the lowest and the highest possible value of constant + Σ coefficient · mean of the subject."""
    # Coefficients of 0 are skipped, because 0 times an infinite end is not a number.
    ends = [[coefficient * end for end in score_range] for coefficient in coefficients.values() if coefficient]
    return constant + sum(map(min, ends)), constant + sum(map(max, ends))
