"""Means, differences and ratios of arms, each on the same seeds and examples, with their confidence distributions.

Seeds get a t distribution, because resampling n seeds can't leave their range: even the whole range of 5 covers a
symmetric distribution's centre in only 1 - 2^(1 - 5) = 94 % of cases. Examples are many, so they get a bootstrap.

An interval is cut where the metric ends (`Estimate.bounds`): no mean accuracy is above 1. The true value is never
outside, so a cut interval contains it as often as the whole one. Tests use the whole distribution.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import brentq
from scipy.special import nctdtr, stdtr, stdtrit

from lorasweep.report.evidence.scores import Array, ConfirmScores

CONFIDENCE = 0.95
MAX_DOUBLINGS = 30

Interval = tuple[float, float]
Coefficients = Mapping[str, float]
"""The weight of each arm in a sum."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConfidenceDistribution:
    """The confidence distribution (Xie and Singh 2013) of a true value: estimate + seed_error · t + deviation.

    Each error alone gives the textbook's interval: the t interval without examples, the percentile bootstrap without
    an error over seeds. Together they are Behrens and Fisher's sum of independent errors.
    """

    estimate: float
    seed_error: float
    """The standard error of the mean over seeds; 0 if seeds make no difference or there is only one."""
    degrees_of_freedom: int
    """The degrees of freedom of `seed_error`: seeds - 1."""
    deviations: Array
    """(draws,) The estimate on resampled examples less the estimate; a single 0 if examples are not known."""

    def cdf(self, value: float) -> float:
        """Returns the confidence that the true value is at most `value`."""
        distances = value - self.estimate - self.deviations
        if self.seed_error > 0:
            return float(stdtr(self.degrees_of_freedom, distances / self.seed_error).mean())
        if len(distances) == 1:
            return float(distances[0] >= 0)
        # No number of draws shows that something never happens (Davison and Hinkley 1997, equation 4.11).
        return float(((distances >= 0).sum() + 1) / (len(distances) + 2))

    def quantile(self, confidence: float) -> float:
        """Returns the value below which the true value lies with that confidence, 0 < confidence < 1."""
        if self.seed_error == 0:
            return float(self.estimate + np.quantile(self.deviations, confidence))
        centre = self.estimate + self.seed_error * float(stdtrit(self.degrees_of_freedom, confidence))
        # The quantile of a mixture lies between the quantiles of its lowest and its highest component.
        low, high = centre + float(self.deviations.min()), centre + float(self.deviations.max())
        if low == high:
            return low
        return float(brentq(lambda value: self.cdf(value) - confidence, low, high, xtol=1e-12))

    @cached_property
    def interval(self) -> Interval:
        """The two-sided 95 % interval."""
        return self.quantile((1 - CONFIDENCE) / 2), self.quantile((1 + CONFIDENCE) / 2)

    @cached_property
    def p_positive(self) -> float:
        """The p value of the one-sided test that shows a positive true value."""
        return self.cdf(0.0)

    @cached_property
    def p_negative(self) -> float:
        """The p value of the one-sided test that shows a negative true value."""
        # 1 - cdf(0) would round small values to 0.
        return replace(self, estimate=-self.estimate, deviations=-self.deviations).cdf(0.0)

    @property
    def p_value(self) -> float:
        """The two-sided p value of the hypothesis that the true value is 0."""
        return min(1.0, 2 * min(self.p_positive, self.p_negative))


def estimate_mean(
    values: Array, deviations: Array | None, *, varies_by_seed: bool = True
) -> ConfidenceDistribution | None:
    """Returns the confidence distribution of the true mean, or None if nothing is known about its error.

    Args:
        values: (seeds,) One value per seed.
        deviations: (draws,) The mean on resampled examples less the mean; None if examples are not known.
        varies_by_seed: Whether a seed makes a difference at all.
    """
    count = len(values)
    if varies_by_seed and count < 2 and deviations is None:
        return None
    return ConfidenceDistribution(
        estimate=float(np.mean(values)),
        seed_error=float(np.std(values, ddof=1)) / count**0.5 if varies_by_seed and count > 1 else 0.0,
        degrees_of_freedom=max(count - 1, 1),
        deviations=np.zeros(1) if deviations is None else deviations,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A weighted sum of the mean scores of arms."""

    value: float
    seeds: tuple[int, ...]
    """The seeds that all arms of the sum have; empty if seeds make no difference."""
    values: tuple[float, ...]
    """The sum for each seed."""
    distribution: ConfidenceDistribution | None
    """None if nothing is known about the error: one seed and no scores of examples."""
    uses_examples: bool
    is_testable: bool
    """Whether the error over seeds is known: there are two seeds, or seeds make no difference. A verdict needs it."""
    bounds: Interval
    """The lowest and the highest possible value of the sum."""

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval, cut at `bounds`."""
        if self.distribution is None:
            return None
        low, high = np.clip(self.distribution.interval, *self.bounds)
        return float(low), float(high)

    @property
    def std(self) -> float | None:
        """The standard deviation over seeds."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def tested(self) -> ConfidenceDistribution | None:
        """The confidence distribution if the error over seeds is known, so that a test is possible."""
        return self.distribution if self.is_testable else None

    def project_power(self, num_seeds: int, *, level: float, sign: float = 1.0, uses_examples: bool = True) -> float:
        """Returns the probability that a one-sided test with `num_seeds` seeds shows a positive true value.

        The mean and the standard deviation over seeds are assumed to stay as measured. The error over examples does
        not shrink with seeds.

        Args:
            num_seeds: The number of seeds, at least 2.
            level: The level of the test.
            sign: -1 for a test that shows a negative true value.
            uses_examples: Whether the error over examples counts.
        """
        example_variance = float(np.var(self.distribution.deviations)) if self.distribution and uses_examples else 0.0
        error = ((self.std or 0.0) ** 2 / num_seeds + example_variance) ** 0.5
        critical = stdtrit(num_seeds - 1, 1 - level)
        # The noncentral t distribution is not computed for very large ratios, at which the power is 1.
        ratio = sign * self.value / max(error, 1e-3 * abs(self.value), sys.float_info.min)
        return 1 - float(nctdtr(num_seeds - 1, ratio, critical))


def estimate_sum(scores: ConfirmScores, coefficients: Coefficients, *, constant: float = 0.0) -> Estimate | None:
    """Returns constant + Σ coefficient · mean of the arm, over the seeds that all arms have; None if they have none."""
    if any(not scores.values.get(arm) for arm in coefficients):
        return None
    seeds = _common_seeds(scores, coefficients)
    if seeds == ():
        return None
    sums = np.full(len(seeds) if seeds else 1, constant)
    for arm, coefficient in coefficients.items():
        sums += coefficient * _select_values(scores, arm, seeds)
    deviations = _sum_deviations(scores, coefficients, seeds)
    return Estimate(
        value=float(sums.mean()),
        seeds=seeds or (),
        values=tuple(map(float, sums)),
        distribution=estimate_mean(sums, deviations, varies_by_seed=seeds is not None),
        uses_examples=deviations is not None,
        is_testable=seeds is None or len(seeds) > 1,
        bounds=_bound_sum(coefficients, scores.score_range, constant=constant),
    )


def estimate_ratio(
    scores: ConfirmScores, numerator: Coefficients, denominator: Coefficients
) -> tuple[float, Interval | None] | None:
    """Returns a ratio of two sums with its interval by Fieller's theorem (1954); None if a sum is not known.

    The interval holds each value for which a test of numerator - value · denominator = 0 does not reject. It is None
    if a test of denominator = 0 does not reject: the interval would have no bounds.
    """
    # A coefficient of 0 for the other sum's arms takes both sums over the same seeds.
    above = estimate_sum(scores, subtract(numerator, denominator, 0.0))
    below = estimate_sum(scores, subtract(denominator, numerator, 0.0))
    if above is None or below is None or below.value == 0:
        return None
    ratio = above.value / below.value
    alone = estimate_sum(scores, denominator)
    tested = alone.tested if alone else None
    if tested is None or tested.p_value > 1 - CONFIDENCE:
        return ratio, None
    low, high = (
        _solve(scores, numerator, denominator, ratio, confidence)
        for confidence in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    )
    return ratio, None if low is None or high is None else (min(low, high), max(low, high))


def _bound_sum(coefficients: Coefficients, score_range: Interval, *, constant: float) -> Interval:
    """Returns the lowest and the highest possible value of constant + Σ coefficient · mean of the arm."""
    # Without 0: the product of 0 and an infinite end is not a number.
    ends = [[coefficient * end for end in score_range] for coefficient in coefficients.values() if coefficient]
    return constant + sum(map(min, ends)), constant + sum(map(max, ends))


def _common_seeds(scores: ConfirmScores, arms: Coefficients) -> tuple[int, ...] | None:
    """Returns the seeds that every arm has; None if seeds make no difference in any of them."""
    sets = [set(scores.values[arm]) for arm in arms if arm not in scores.deterministic]
    return tuple(sorted(set.intersection(*sets))) if sets else None


def _select_values(scores: ConfirmScores, arm: str, seeds: tuple[int, ...] | None) -> Array:
    values = scores.values[arm]
    if arm in scores.deterministic or seeds is None:
        # The base model has one score. It stands beside every seed.
        return np.full(len(seeds) if seeds else 1, float(np.mean(list(values.values()))))
    return np.array([values[seed] for seed in seeds])


def _sum_deviations(scores: ConfirmScores, coefficients: Coefficients, seeds: tuple[int, ...] | None) -> Array | None:
    sums = []
    for arm, coefficient in coefficients.items():
        own_seeds = scores.values[arm] if arm in scores.deterministic or seeds is None else seeds
        keys = [(arm, seed) for seed in own_seeds]
        if any(key not in scores.deviations for key in keys):
            return None
        sums.append(coefficient * np.mean([scores.deviations[key] for key in keys], axis=0))
    return np.sum(sums, axis=0)  # type: ignore[no-any-return]


def subtract(numerator: Coefficients, denominator: Coefficients, factor: float) -> dict[str, float]:
    """Returns the coefficients of numerator - factor · denominator."""
    arms = dict.fromkeys([*numerator, *denominator])
    return {arm: numerator.get(arm, 0.0) - factor * denominator.get(arm, 0.0) for arm in arms}


def _solve(
    scores: ConfirmScores, numerator: Coefficients, denominator: Coefficients, ratio: float, confidence: float
) -> float | None:
    """Returns the ratio at which 0 is the quantile of numerator - ratio · denominator, or None if it is not found."""

    def excess(value: float) -> float:
        found = estimate_sum(scores, subtract(numerator, denominator, value))
        return found.distribution.cdf(0.0) - confidence if found and found.distribution else -confidence

    # The bracket grows from the estimate until it holds a change of sign, below the estimate first.
    for direction in (-1, 1):
        width = 0.05
        for _ in range(MAX_DOUBLINGS):
            if excess(ratio) * excess(ratio + direction * width) < 0:
                return float(brentq(excess, *sorted((ratio, ratio + direction * width)), xtol=1e-9))
            width *= 2
    return None
