"""Means, differences and ratios of arms, each on the same seeds and examples. Comes after `scores`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from lorasweep.report.evidence.confidence import CONFIDENCE, Array, ConfidenceDistribution, distribute
from lorasweep.report.evidence.scores import SEED, ConfirmScores

MIN_BOOTSTRAP = 3
"""Two seeds have three resamples: not even a rough interval."""
RESAMPLES = 9999
MAX_DOUBLINGS = 30

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A weighted sum of arms' mean scores."""

    value: float
    seeds: tuple[int, ...]
    """Those that every arm of it has; empty where seeds make no difference."""
    values: tuple[float, ...]
    """The sum for each seed."""
    distribution: ConfidenceDistribution | None
    """None where nothing is known about its error: one seed and no scores of examples."""
    uses_examples: bool
    is_testable: bool
    """Whether chance over seeds is known: two seeds, or none that matters. A verdict needs that."""

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval."""
        return self.distribution.interval if self.distribution else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


def estimate_sum(scores: ConfirmScores, coefficients: Mapping[str, float]) -> Estimate | None:
    """Returns Σ coefficient · mean of the arm over the seeds that all of them have, or None where there are none."""
    if any(not scores.values.get(arm) for arm in coefficients):
        return None
    seeds = _common_seeds(scores, coefficients)
    if seeds == ():
        return None
    sums = np.zeros(len(seeds) if seeds else 1)
    for arm, coefficient in coefficients.items():
        sums += coefficient * _values_of(scores, arm, seeds)
    deviations = _sum_deviations(scores, coefficients, seeds)
    return Estimate(
        value=float(sums.mean()),
        seeds=seeds or (),
        values=tuple(map(float, sums)),
        distribution=distribute(sums, deviations, has_chance=seeds is not None),
        uses_examples=deviations is not None,
        is_testable=seeds is None or len(seeds) > 1,
    )


def bootstrap_interval(scores: ConfirmScores, arm: str) -> Interval | None:
    """Returns the plain bootstrap interval of an arm's mean: over seeds, and over examples where they are known.

    Over both it is the pigeonhole bootstrap (Owen 2007): seeds and examples are drawn apart, since every seed scored
    the same examples. Over seeds alone it is BCa (Efron 1987). With few seeds both are too narrow; see `confidence`.
    """
    seeds = sorted(scores.values.get(arm, {}))
    values = np.array([scores.values[arm][seed] for seed in seeds])
    if arm in scores.chanceless or len(seeds) < MIN_BOOTSTRAP or np.ptp(values) == 0:
        return None
    if any((arm, seed) not in scores.deviations for seed in seeds):
        return _bootstrap_seeds(values)
    deviations = np.array([scores.deviations[arm, seed] for seed in seeds])  # (seeds, draws)
    drawn = np.random.default_rng(SEED).integers(len(seeds), size=deviations.shape)
    means = (values[drawn] + np.take_along_axis(deviations, drawn, axis=0)).mean(axis=0)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def estimate_ratio(
    scores: ConfirmScores, numerator: Mapping[str, float], denominator: Mapping[str, float]
) -> tuple[float, Interval | None] | None:
    """Returns a ratio of two sums with its interval by Fieller's theorem (1954); None where the sums can't be had.

    A value is inside the interval where numerator - value · denominator is not distinguishable from 0. Where the
    denominator itself is not, the interval is not bounded, and None stands for it.
    """
    below = estimate_sum(scores, denominator)
    ratio = _ratio_at(scores, numerator, denominator)
    if below is None or ratio is None:
        return None
    known = below.is_testable and below.distribution is not None
    if not known or below.distribution is None or below.distribution.p_value > 1 - CONFIDENCE:
        return ratio, None
    ends = [
        _solve(scores, numerator, denominator, ratio, confidence)
        for confidence in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    ]
    low, high = ends
    return ratio, None if low is None or high is None else (min(low, high), max(low, high))


def _common_seeds(scores: ConfirmScores, arms: Mapping[str, float]) -> tuple[int, ...] | None:
    """Returns the seeds that every arm has; None where seeds make no difference in any of them."""
    sets = [set(scores.values[arm]) for arm in arms if arm not in scores.chanceless]
    return tuple(sorted(set.intersection(*sets))) if sets else None


def _values_of(scores: ConfirmScores, arm: str, seeds: tuple[int, ...] | None) -> Array:
    values = scores.values[arm]
    if arm in scores.chanceless or seeds is None:
        # the base's one score stands beside every seed
        return np.full(len(seeds) if seeds else 1, float(np.mean(list(values.values()))))
    return np.array([values[seed] for seed in seeds])


def _sum_deviations(
    scores: ConfirmScores, coefficients: Mapping[str, float], seeds: tuple[int, ...] | None
) -> Array | None:
    parts = []
    for arm, coefficient in coefficients.items():
        mine = scores.values[arm] if arm in scores.chanceless or seeds is None else seeds
        keys = [(arm, seed) for seed in mine]
        if any(key not in scores.deviations for key in keys):
            return None
        parts.append(coefficient * np.mean([scores.deviations[key] for key in keys], axis=0))
    return np.sum(parts, axis=0)  # type: ignore[no-any-return]


def _bootstrap_seeds(values: Array) -> Interval:
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="BCa", rng=SEED
    ).confidence_interval
    return float(found.low), float(found.high)


def _difference(numerator: Mapping[str, float], denominator: Mapping[str, float], value: float) -> dict[str, float]:
    arms = dict.fromkeys([*numerator, *denominator])
    return {arm: numerator.get(arm, 0.0) - value * denominator.get(arm, 0.0) for arm in arms}


def _ratio_at(scores: ConfirmScores, numerator: Mapping[str, float], denominator: Mapping[str, float]) -> float | None:
    # 0 · denominator: the numerator on the seeds that both sums have
    above = estimate_sum(scores, _difference(numerator, denominator, 0.0))
    below = estimate_sum(scores, _difference(denominator, numerator, 0.0))
    return above.value / below.value if above and below and below.value != 0 else None


def _solve(
    scores: ConfirmScores,
    numerator: Mapping[str, float],
    denominator: Mapping[str, float],
    ratio: float,
    confidence: float,
) -> float | None:
    def excess(value: float) -> float:
        found = estimate_sum(scores, _difference(numerator, denominator, value))
        return found.distribution.below(0.0) - confidence if found and found.distribution else -confidence

    for direction in (-1, 1):
        width = 0.05
        for _ in range(MAX_DOUBLINGS):
            if excess(ratio) * excess(ratio + direction * width) < 0:
                return float(brentq(excess, *sorted((ratio, ratio + direction * width)), xtol=1e-9))
            width *= 2
    return None
