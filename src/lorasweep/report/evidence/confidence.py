"""Where a true value may lie, given an estimate from a few seeds and many test examples. First of this package.

Over seeds a t distribution, because resampling n seeds can't leave their range: even the whole range of 5 covers a
symmetric distribution's centre in only 1 - 2^(1 - 5) = 94 % of cases. Over examples, of which there are many, a
bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import nctdtrinc, stdtr, stdtrit

Array = NDArray[np.float64]

CONFIDENCE = 0.95
POWER = 0.8
"""Chance of seeing a difference as large as `smallest_visible`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConfidenceDistribution:
    """The confidence distribution (Xie and Singh 2013) of a true value: estimate + seed_error · t + a draw of examples.

    Both parts alone give the textbook's intervals: without examples the t interval, without chance over seeds the
    percentile bootstrap. Together they are Behrens and Fisher's sum of independent errors.
    """

    estimate: float
    seed_error: float
    """Standard error of the mean over seeds; 0 where seeds make no difference or there is one."""
    freedom: int
    """Degrees of freedom of that error: seeds - 1."""
    deviations: Array
    """What the estimate would have been on examples drawn again, less the estimate; one 0 where they aren't known."""

    def below(self, value: float) -> float:
        """Returns the confidence that the true value is at most `value`."""
        distances = value - self.estimate - self.deviations
        if self.seed_error > 0:
            return float(stdtr(self.freedom, distances / self.seed_error).mean())
        if len(distances) == 1:
            return float(distances[0] >= 0)
        # no number of draws shows that something never happens (Davison and Hinkley 1997, equation 4.11)
        return float(((distances >= 0).sum() + 1) / (len(distances) + 2))

    def quantile(self, confidence: float) -> float:
        """Returns the value below which the true value lies with that confidence, 0 < confidence < 1."""
        if self.seed_error == 0:
            return float(self.estimate + np.quantile(self.deviations, confidence))
        tail = self.estimate + self.seed_error * float(stdtrit(self.freedom, confidence))
        low, high = tail + float(self.deviations.min()), tail + float(self.deviations.max())
        if low == high:
            return low
        # a quantile of a mixture lies between those of its outermost parts
        return float(brentq(lambda value: self.below(value) - confidence, low, high, xtol=1e-12))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The two-sided 95 % interval."""
        return self.quantile((1 - CONFIDENCE) / 2), self.quantile((1 + CONFIDENCE) / 2)

    @cached_property
    def p_value(self) -> float:
        """Two-sided p value of the true value being 0."""
        if self.seed_error == 0 and len(self.deviations) == 1:
            return float(self.estimate == self.deviations[0])
        below = self.below(0.0)
        return min(1.0, 2 * min(below, self._above_zero()))

    def smallest_visible(self, level: float) -> float:
        """Returns the minimum detectable difference: seen at that level with a chance of 80 %.

        It is the sum of two quantiles of the error (Bloom 1995). With few seeds that is too little, since the error is
        itself estimated: it is then stretched by what the noncentral t distribution gives more for seeds alone.

        Args:
            level: Two-sided level of the test, 0 < level < 1.
        """
        quantiles = self._reach(1 - level / 2) + self._reach(POWER)
        return quantiles * _small_sample_factor(self.freedom, level) if self.seed_error > 0 else quantiles

    def _above_zero(self) -> float:
        # the mirrored distribution: 1 - below(0) would round away what is small
        return ConfidenceDistribution(
            estimate=-self.estimate, seed_error=self.seed_error, freedom=self.freedom, deviations=-self.deviations
        ).below(0.0)

    def _reach(self, confidence: float) -> float:
        """The larger of the two distances from the estimate that hold the true value on one side."""
        return max(self.quantile(confidence) - self.estimate, self.estimate - self.quantile(1 - confidence))


def _small_sample_factor(freedom: int, level: float) -> float:
    critical = stdtrit(freedom, 1 - level / 2)
    return float(nctdtrinc(freedom, 1 - POWER, critical) / (critical + stdtrit(freedom, POWER)))


def distribute(values: Array, deviations: Array | None, *, has_chance: bool = True) -> ConfidenceDistribution | None:
    """Returns where the true mean of values may lie, or None where nothing is known about its error.

    Args:
        values: One per seed.
        deviations: Bootstrap over examples: what the mean would have been, less the mean. None where not known.
        has_chance: Whether a seed makes a difference at all.
    """
    count = len(values)
    if has_chance and count < 2 and deviations is None:
        return None
    error = float(np.std(values, ddof=1)) / count**0.5 if has_chance and count > 1 else 0.0
    known: Any = np.zeros(1) if deviations is None else deviations
    return ConfidenceDistribution(
        estimate=float(np.mean(values)), seed_error=error, freedom=max(count - 1, 1), deviations=known
    )
