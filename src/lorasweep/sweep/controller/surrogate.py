"""A Gaussian process over an arm's trials: predicts the score of settings that were not tried.

Its length scales are fixed, because a dozen trials are too few to estimate them. They were chosen by replay on stored
grids (docs/benchmarks.md, Proposals): the score changes within half a decade of u, and at a fixed u slowly with rank
and α.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.config.method import ALPHA_OVER_RANK
from lorasweep.config.ranges import is_number
from lorasweep.config.run import ALPHA, LR, RANK
from lorasweep.sweep.controller.encoding import RateLaw
from lorasweep.sweep.definition.space import Space

Array = NDArray[np.float64]

RATE_LENGTH_SCALE_DECADES = 0.5
"""Length scale of the kernel in u = lr · √(s · r) (`RateLaw`), in decades."""
LENGTH_SCALES_OCTAVES = {RANK: 7.5, ALPHA: 10.0, ALPHA_OVER_RANK: 10.0}
"""Length scales of rank and α at the same u, in octaves."""
RANGE_LENGTH_SCALE = 0.5
"""Length scale of any other number, as a fraction of its range."""
CHOICE_LENGTH_SCALE = 1.5
"""Length scale of choices that are not numbers. Two different choices have the distance 1."""
NOISE_VARIANCE = 0.03
"""Variance of the noise of a score, as a share of the variance of the scores."""
PARTIAL_NOISE_VARIANCE = 1.0
"""Variance of the additional noise of a trial that has done no step, in the same unit. It falls linearly to 0 at the
last step."""
JITTER = 1e-6
"""Added to the diagonal of a covariance, so that rounding does not make it singular."""
DRAW_SEED = 0
NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution, divided by its median absolute deviation."""


class Coordinates:
    """Places an arm's parameters in the space of the Gaussian process, in units of its length scales."""

    def __init__(self, space: Space, law: RateLaw) -> None:
        self._space = {key: space[key] for key in sorted(space) if not space[key].single()}
        self._law = law

    def place(self, params: Sequence[Mapping[str, Any]]) -> Array:
        """Returns (settings, dimensions) coordinates of settings, each with a value for every swept key."""
        columns: list[list[float]] = []
        for key, distribution in self._space.items():
            values = [one[key] for one in params]
            if key == LR:
                rates = [math.log10(one[LR] * self._law.factor(one)) for one in params]
                columns.append([rate / RATE_LENGTH_SCALE_DECADES for rate in rates])
            elif key in LENGTH_SCALES_OCTAVES and all(is_number(value) and value > 0 for value in values):
                columns.append([math.log2(value) / LENGTH_SCALES_OCTAVES[key] for value in values])
            elif isinstance(distribution, FloatDistribution | IntDistribution):
                columns.append([_find_position(value, distribution) / RANGE_LENGTH_SCALE for value in values])
            elif isinstance(distribution, CategoricalDistribution):
                columns += _place_choices(values, distribution.choices)
        return np.array(columns, dtype=np.float64).reshape(-1, len(params)).T


def _find_position(value: float, distribution: FloatDistribution | IntDistribution) -> float:
    """Returns where a value lies in its range, from 0 to 1."""
    low, high = distribution.low, distribution.high
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def _place_choices(values: Sequence[Any], choices: Sequence[Any]) -> list[list[float]]:
    """Returns one column with the positions of numbers among the sorted choices, or one column per choice."""
    if all(map(is_number, choices)):
        order = sorted(choices)
        return [[order.index(value) / (len(order) - 1) / RANGE_LENGTH_SCALE for value in values]]
    names = [repr(choice) for choice in choices]  # 1, 1.0 and True are equal
    side = 1 / (math.sqrt(2) * CHOICE_LENGTH_SCALE)
    return [[side * (repr(value) == name) for value in values] for name in names]


@dataclass(frozen=True, kw_only=True, eq=False)
class Surrogate:
    """A Gaussian process that was fitted to an arm's trials. Costs: lower is better."""

    points: Array
    """(trials, dimensions)"""
    centre: float
    scale: float
    factor: Array
    """(trials, trials) Cholesky factor of the covariance of the trials."""
    weights: Array
    """(trials,) Inverse covariance times the scaled costs."""

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Returns the mean and the standard deviation of the cost at (settings, dimensions) points."""
        cross = compute_kernel(points, self.points)
        half = np.linalg.solve(self.factor, cross.T)
        variance = np.maximum(1.0 - (half**2).sum(axis=0), 0.0)
        return self.centre + self.scale * (cross @ self.weights), self.scale * np.sqrt(variance)

    def draw(self, points: Array, *, num_draws: int) -> Array:
        """Returns (draws, settings) samples of the costs at (settings, dimensions) points, without noise."""
        cross = compute_kernel(points, self.points)
        half = np.linalg.solve(self.factor, cross.T)
        covariance = compute_kernel(points, points) - half.T @ half + JITTER * np.eye(len(points))
        normal = np.random.default_rng(DRAW_SEED).standard_normal((num_draws, len(points)))
        mean, _ = self.predict(points)
        return np.asarray(mean + self.scale * normal @ np.linalg.cholesky(covariance).T)


def fit_surrogate(points: Array, costs: Sequence[float], *, done: Sequence[float]) -> Surrogate:
    """Returns a Gaussian process with Matérn 5/2 kernel (Rasmussen and Williams 2006, equation 4.17).

    Costs that are more than one robust standard deviation worse than the median become that value: a diverged trial
    says that its setting is bad, and its number would only hide the differences between good settings.

    Args:
        points: (trials, dimensions) coordinates in units of the length scales.
        costs: (trials,) The cost of each trial; lower is better.
        done: (trials,) The fraction of its steps that each trial has done, from 0 to 1.
    """
    values = np.asarray(costs, dtype=np.float64)
    median = float(np.median(values))
    spread = NORMAL_MAD * float(np.median(np.abs(values - median)))
    if spread == 0:  # most trials have the same score, such as that of the constant answer
        spread = median - float(values.min())
    values = np.minimum(values, median + spread)
    scale = max(spread, 1e-12)
    centre = float(values.mean())
    noise = NOISE_VARIANCE + PARTIAL_NOISE_VARIANCE * (1.0 - np.asarray(done, dtype=np.float64))
    factor = np.linalg.cholesky(compute_kernel(points, points) + np.diag(noise))
    weights = np.linalg.solve(factor.T, np.linalg.solve(factor, (values - centre) / scale))
    return Surrogate(points=points, centre=centre, scale=scale, factor=np.asarray(factor), weights=np.asarray(weights))


def compute_kernel(first: Array, second: Array) -> Array:
    """Returns (n, m) Matérn 5/2 covariances of (n, dimensions) and (m, dimensions) points."""
    distances = math.sqrt(5) * np.sqrt(((first[:, None] - second[None]) ** 2).sum(axis=-1))
    covariances: Array = (1 + distances + distances**2 / 3) * np.exp(-distances)
    return covariances
