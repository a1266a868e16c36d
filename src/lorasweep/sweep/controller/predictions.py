"""The Gaussian process of arms whose dimensions are known: proposes trials, and predicts the best settings.

These are arms with `confirm_each`, whose values share one search, and arms that search the learning rate alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorasweep.config.data import METRIC_RANGES, ScoreMetric
from lorasweep.config.run import ALPHA, LR, RANK
from lorasweep.record import SettingRow, Subject, Trial, is_number
from lorasweep.sweep.controller.encoding import (
    History,
    Point,
    RateLaw,
    SpaceEncoding,
    build_rate_law,
    draw_sobol_point,
    get_score,
)
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.ranges import Range, Space

Array = NDArray[np.float64]

# The length scales are fixed, because a dozen trials are too few to estimate them. They were chosen by replay on stored
# grids (docs/benchmarks.md, Proposals).
RATE_LENGTH_SCALE_DECADES = 0.5
"""Length scale of the kernel in u = lr · √(s · r) (`RateLaw`), in decades."""
LENGTH_SCALES_OCTAVES = {RANK: 7.5, ALPHA: 10.0}
"""Length scales of rank and α at the same u, in octaves."""
RANGE_LENGTH_SCALE = 0.5
"""Length scale of any other number, as a fraction of its range."""
CHOICE_LENGTH_SCALE = 1.5
"""Length scale of choices that are not numbers. Two different choices have the distance 1."""
NOISE_VARIANCES = (0.01, 0.03, 0.1, 0.3)
"""Variances of the noise of a score, as shares of the variance of the scores. The most likely one is taken: seeds
scatter much more on short sentences than on text."""
JITTER = 1e-6
"""Added to the diagonal of a covariance, so that rounding does not make it singular."""
DRAW_SEED = 0
STD_PER_MAD = 1.4826
"""Standard deviation of a normal distribution, divided by its median absolute deviation."""
STD_PER_MEAN_DEVIATION = 1.2533
"""The same for its mean absolute deviation, which replaces a median of 0 (Iglewicz and Hoaglin 1993)."""

NUM_CANDIDATES = 256
"""Number of settings per value among which the best is chosen. Over two decades, neighbouring rates differ by 2 %."""
CANDIDATE_SEED = 0
EXPLORATION = 1.0
"""A new trial has the lowest `mean - EXPLORATION · standard deviation`. On stored grids 1 leaves less regret than 0."""
REGRET_DRAWS = 500
REGRET_CANDIDATES = 64
RATE_DIGITS = 3
"""Significant digits of a predicted learning rate."""


def place_settings(params: Sequence[Mapping[str, Any]], *, space: Space, law: RateLaw) -> Array:
    """Returns (settings, dimensions) coordinates of settings in the space of the Gaussian process, in length scales.

    Each setting has a value for every key of the arm's space.
    """
    columns: list[list[float]] = []
    for key, range_ in sorted(space.items()):
        if range_.is_single:
            continue
        values = [setting[key] for setting in params]
        if key == LR:
            rates = [math.log10(setting[LR] * law.factor(setting)) for setting in params]
            columns.append([rate / RATE_LENGTH_SCALE_DECADES for rate in rates])
        elif key in LENGTH_SCALES_OCTAVES and all(is_number(value) and value > 0 for value in values):
            columns.append([math.log2(value) / LENGTH_SCALES_OCTAVES[key] for value in values])
        elif range_.choices and not range_.are_numbers:
            columns += _place_choices(values, range_.choices)
        else:
            encoded = range_.encoded
            columns.append([encoded.find_fraction(range_.encode(value)) / RANGE_LENGTH_SCALE for value in values])
    return np.array(columns, dtype=np.float64).reshape(-1, len(params)).T


def _place_choices(values: Sequence[Any], choices: Sequence[Any]) -> list[list[float]]:
    """Returns one column per choice."""
    names = [repr(choice) for choice in choices]  # 1, 1.0 and True are equal
    side = 1 / (math.sqrt(2) * CHOICE_LENGTH_SCALE)
    return [[side * (repr(value) == name) for value in values] for name in names]


@dataclass(frozen=True, kw_only=True, eq=False)
class Surrogate:
    """A Gaussian process that was fitted to the costs of an arm's trials. A lower cost is better."""

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


def fit_surrogate(points: Array, costs: Sequence[float]) -> Surrogate:
    """Returns a fitted Gaussian process with a Matérn 5/2 kernel (Rasmussen and Williams 2006, equation 4.17).

    Costs are cut off at the median plus one robust standard deviation: a diverged trial says that its setting is bad,
    and its number would only hide the differences between good settings. Far from all trials the mean is the worst of
    these costs, so that no setting is chosen because nothing is known about it.

    Args:
        points: (trials, dimensions) coordinates in units of the length scales.
        costs: (trials,) The cost of each trial; lower is better.
    """
    values = np.asarray(costs, dtype=np.float64)
    median = float(np.median(values))
    spread = STD_PER_MAD * float(np.median(np.abs(values - median)))
    if spread == 0:  # most trials have the same score, such as that of the constant answer, or the highest possible one
        spread = STD_PER_MEAN_DEVIATION * float(np.mean(np.abs(values - median)))
    values = np.minimum(values, median + spread)
    scale = max(spread, 1e-12)
    centre = float(values.max())
    scaled, kernel = (values - centre) / scale, compute_kernel(points, points)
    best_likelihood = -math.inf
    for noise in NOISE_VARIANCES:
        noisy_factor = np.linalg.cholesky(kernel + noise * np.eye(len(points)))
        noisy_weights = np.linalg.solve(noisy_factor.T, np.linalg.solve(noisy_factor, scaled))
        # the logarithm of the likelihood without a constant (Rasmussen and Williams 2006, equation 2.30)
        log_likelihood = -0.5 * float(scaled @ noisy_weights) - float(np.log(np.diag(noisy_factor)).sum())
        if log_likelihood > best_likelihood:
            best_likelihood, factor, weights = log_likelihood, noisy_factor, noisy_weights
    return Surrogate(points=points, centre=centre, scale=scale, factor=np.asarray(factor), weights=np.asarray(weights))


def compute_kernel(first: Array, second: Array) -> Array:
    """Returns (n, m) Matérn 5/2 covariances of (n, dimensions) and (m, dimensions) points."""
    distances = math.sqrt(5) * np.sqrt(((first[:, None] - second[None]) ** 2).sum(axis=-1))
    covariances: Array = (1 + distances + distances**2 / 3) * np.exp(-distances)
    return covariances


def has_own_model(arm: Arm) -> bool:
    """Returns whether `propose_by_model` proposes the trials of an arm, if its sampler is `gp`."""
    return arm.confirm_each is not None or [key for key, range_ in arm.space.items() if not range_.is_single] == [LR]


def propose_by_model(arm: Arm, history: History, *, seed: int) -> Point:
    """Returns the point with the lowest confidence bound of the cost, for the value with the fewest trials.

    Running trials count as if they scored what the model predicts (kriging believer, Ginsbourger et al. 2010), so that
    trials that begin together differ.
    """
    encoding, results, running = history.encoding, history.list_results(), history.list_running()
    fixed = {}
    if arm.confirm_each is not None:
        counts = Counter(history.point(trial)[arm.confirm_each] for trial in (*results, *running))
        values = range(len(arm.space[arm.confirm_each].choices))
        fixed = {arm.confirm_each: min(values, key=lambda index: (counts[index], index))}
    place = partial(place_settings, space=arm.space, law=build_rate_law(arm))
    points = place([encoding.decode(history.point(trial)) for trial in results])
    sign = history.metric.sign
    known = [None if (score := get_score(trial)) is None else sign * score for trial in results]
    # the median replaces missing costs, such as those of infeasible trials
    median = float(np.median([cost for cost in known if cost is not None]))
    costs = [median if cost is None else cost for cost in known]
    surrogate = fit_surrogate(points, costs)
    if running:
        believed = place([encoding.decode(history.point(trial)) for trial in running])
        expected = surrogate.predict(believed)[0]
        surrogate = fit_surrogate(np.concatenate([points, believed]), [*costs, *expected])
    candidates = []
    for index in range(NUM_CANDIDATES):
        point = {**draw_sobol_point(encoding, index, seed=seed), **fixed}
        candidates.append(encoding.move_into_range(point, (index + 0.5) / NUM_CANDIDATES))
    candidates = [point for point in candidates if not history.has_tried(point)]
    if not candidates:
        return draw_sobol_point(encoding, len(results) + len(running), seed=seed)
    mean, deviation = surrogate.predict(place([encoding.decode(point) for point in candidates]))
    return candidates[int(np.argmin(mean - EXPLORATION * deviation))]


def predict_best(
    arm: Arm,
    trials: Sequence[Trial],
    subject: Subject,
    *,
    metric: ScoreMetric,
    chosen: Mapping[str, Any] | None = None,
) -> SettingRow | None:
    """Returns the setting that is predicted best for a subject, or the prediction for the setting `chosen`.

    Returns None if no trial is complete, or if a trial with the subject's value ran out of memory and none with this
    value has a score.
    """
    law, sign, fixed = build_rate_law(arm), metric.sign, subject.params
    results = [(trial, score) for trial in trials if (score := get_score(trial)) is not None]
    complete = [trial for trial, _ in results if trial.state == "complete"]
    infeasible = [trial for trial in trials if trial.state == "infeasible" and fixed.items() <= trial.params.items()]
    if not complete or (infeasible and not any(fixed.items() <= trial.params.items() for trial, _ in results)):
        return None
    place = partial(place_settings, space=arm.space, law=law)
    surrogate = fit_surrogate(place([trial.params for trial, _ in results]), [sign * score for _, score in results])
    tried = {trial.number: dict(trial.params) for trial in complete if fixed.items() <= trial.params.items()}
    candidates = [*tried.values(), *_list_settings(arm.space, law, fixed)]
    placed = place(candidates)
    mean, _ = surrogate.predict(placed)
    best = int(np.argmin(mean)) if chosen is None else candidates.index(dict(chosen))
    step = max(len(placed) // REGRET_CANDIDATES, 1)
    draws = surrogate.draw(np.concatenate([placed[best : best + 1], placed[::step]]), num_draws=REGRET_DRAWS)
    draws = np.maximum(draws, _find_lowest_cost([sign * score for _, score in results]))
    low, high = METRIC_RANGES.get(metric.name, (-math.inf, math.inf))  # the Gaussian process predicts beyond it
    return SettingRow(
        subject=subject.name,
        arm=arm.name,
        setting=0,  # the confirm stage numbers them
        params=candidates[best],
        trial=list(tried)[best] if best < len(tried) else None,
        score=min(max(sign * float(mean[best]), low), high),
        regret=float((draws[:, 0] - draws.min(axis=1)).mean()) if arm.space else None,
    )


def _find_lowest_cost(costs: Sequence[float]) -> float:
    """Returns the lowest cost that an untried setting may have; minus infinity if nothing is known.

    If at least half of the trials have exactly the lowest cost, the score is near its ceiling, such as an accuracy of
    80 % where a fifth of the labels are wrong. An untried setting may then be better by the smallest difference between
    two scores. The Gaussian process does not know the ceiling, and would predict scores above it.
    """
    lowest, *others = sorted(set(costs))
    if not others or 2 * costs.count(lowest) < len(costs):
        return -math.inf
    return lowest - min(high - low for low, high in pairwise((lowest, *others)))


def _list_settings(space: Space, law: RateLaw, fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns settings that cover the space at the fixed values, with rates of a few digits."""
    rest = {key: Range(choices=(fixed[key],)) if key in fixed else range_ for key, range_ in space.items()}
    encoding = SpaceEncoding(rest, law=law)
    if not encoding.ranges:
        return [encoding.decode({})]
    points = [draw_sobol_point(encoding, index, seed=CANDIDATE_SEED) for index in range(NUM_CANDIDATES)]
    settings = [encoding.decode(point) for point in points]
    for params in settings:
        if LR in encoding.ranges and not rest[LR].choices:
            params[LR] = float(f"{params[LR]:.{RATE_DIGITS}g}")
    return settings
