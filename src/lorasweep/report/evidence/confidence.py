"""The confidence distribution of a true value that was estimated from a few seeds and many test examples.

Seeds get a t distribution, because resampling n seeds can't leave their range: even the whole range of 5 covers a
symmetric distribution's centre in only 1 - 2^(1 - 5) = 94 % of cases. Examples are many, so they get a bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import nctdtrinc, stdtr, stdtrit

Array = NDArray[np.float64]

CONFIDENCE = 0.95
POWER = 0.8
"""The probability with which `minimum_detectable` would be detected."""


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
    def interval(self) -> tuple[float, float]:
        """The two-sided 95 % interval."""
        return self.quantile((1 - CONFIDENCE) / 2), self.quantile((1 + CONFIDENCE) / 2)

    @cached_property
    def p_value(self) -> float:
        """The two-sided p value of the hypothesis that the true value is 0."""
        if self.seed_error == 0 and len(self.deviations) == 1:
            return float(self.estimate == self.deviations[0])
        # The mirrored distribution gives the upper tail: 1 - cdf(0) would round small values to 0.
        mirrored = replace(self, estimate=-self.estimate, deviations=-self.deviations)
        return min(1.0, 2 * min(self.cdf(0.0), mirrored.cdf(0.0)))

    def minimum_detectable(self, level: float) -> float:
        """Returns the minimum detectable difference: it would be detected at that level in 80 % of cases.

        It is the sum of two quantiles of the error (Bloom 1995). With few seeds that sum is too small, since the error
        is itself estimated. It is therefore stretched by the factor that the noncentral t distribution gives for seeds
        alone.

        Args:
            level: The two-sided level of the test, 0 < level < 1.
        """
        quantiles = self._distance(1 - level / 2) + self._distance(POWER)
        if self.seed_error == 0:
            return quantiles
        critical = stdtrit(self.degrees_of_freedom, 1 - level / 2)
        exact = nctdtrinc(self.degrees_of_freedom, 1 - POWER, critical)
        return quantiles * float(exact / (critical + stdtrit(self.degrees_of_freedom, POWER)))

    def _distance(self, confidence: float) -> float:
        """Returns the larger distance from the estimate to its two one-sided bounds."""
        return max(self.quantile(confidence) - self.estimate, self.estimate - self.quantile(1 - confidence))


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
