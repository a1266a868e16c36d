"""The best learning rate of each arm: how flat its optimum is, its trend over rank, its ratio to full's; best α/r."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lorasweep.report.advice.edges import edges_of
from lorasweep.report.advice.noise import ALPHA, LR, RANK, near_best, rank_groups, rank_of, tolerance_of
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.wording import format_ratio, format_setting, join_words

MIN_RANK_RATIO = 4.0
"""The highest rank must be this many times the lowest before the report says how the best rate moves with rank."""
MIN_FIT_TRIALS = 5
"""A parabola is fitted to at least this many trials: it has three coefficients, so fewer would say nothing."""
SCALING, SQRT = "method.scaling", "alpha_over_sqrt_rank"


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """A fit of sign · score over log10 of the learning rate near the best: a (x - x0)² + c, a > 0."""

    curvature: float
    lr: float
    """Where it is lowest."""
    lowest: float
    low: float
    """Lowest and highest learning rate of the trials that it was fitted to."""
    high: float


@dataclass(frozen=True, kw_only=True)
class RateAdvice:
    """The best learning rate of one arm."""

    arm: str
    lr: float
    """That of the best trial."""
    fitted_lr: float | None
    """Where a parabola through the trials near the best is lowest, inside their range."""
    low: float
    """Lowest and highest learning rate whose trials score as well as the best, within the noise."""
    high: float
    is_edge: bool
    """Whether the best lies at an end of its range, so that the truth may lie outside."""
    tolerance: str
    """What "as well" rests on."""
    ratio_to_full: float | None
    """Best learning rate over full fine-tuning's; the fitted ones where both are known."""
    ratio_interval: tuple[float, float] | None
    """Smallest and largest ratio of learning rates that are as good as the best of both."""
    scaling: str
    """The rule by which α scales the change: `alpha_over_rank`, or rsLoRA's `alpha_over_sqrt_rank`."""
    scale: float | None
    """α/r, or α/√r, of the best trial, and its range among trials that score as well."""
    scale_range: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class RateTrend:
    """How the best learning rate moves over arms that differ in rank alone."""

    arms: tuple[str, ...]
    ranks: tuple[float, ...]
    lrs: tuple[float, ...]
    exponent: float
    """Slope of log lr over log rank: lr ∝ rank^exponent; 0 is constant, -0.5 is 1/√r."""
    exponent_error: float | None
    """Its standard error; None with two ranks."""


def advise_rates(data: SweepData) -> list[RateAdvice]:
    """Returns the best learning rate of each arm that swept it."""
    full = data.best_arm("full")
    reference = _advise_rate(full, data, None) if full else None
    advised = [_advise_rate(arm, data, None if arm is full else reference) for arm in data.arms]
    return [advice for advice in advised if advice]


def find_trends(data: SweepData, rates: Sequence[RateAdvice]) -> list[RateTrend]:
    """Returns how the best learning rate moves with rank in each group of arms."""
    best = {rate.arm: rate.fitted_lr or rate.lr for rate in rates}
    groups = [[arm for arm in group if arm.name in best] for group in rank_groups(data.arms)]
    return [_fit_trend(group, best) for group in groups if _span(group) >= MIN_RANK_RATIO]


def _span(group: Sequence[Arm]) -> float:
    """Returns the highest rank over the lowest."""
    ranks = [rank_of(arm) or 1.0 for arm in group]
    return max(ranks) / min(ranks) if ranks else 1.0


def fit_arm(arm: Arm, data: SweepData) -> Parabola | None:
    """Returns the parabola of an arm that searched nothing but the learning rate; None for others."""
    if set(arm.row.space) != {LR}:
        return None
    complete = [trial for trial in arm.trials if trial.is_complete]
    return fit_parabola(complete, sign=data.sign, base=data.score_of("frozen"))


def fit_parabola(trials: Sequence[Trial], *, sign: int, base: float | None) -> Parabola | None:
    """Returns the parabola through an arm's better half of complete trials; None where it has no lowest point there.

    Args:
        trials: Trials of an arm that swept nothing but the learning rate.
        sign: 1 where lower scores are better, else -1.
        base: Score of the frozen base: trials that lose more than half of the best's gain are left out, because far
            from the best a score is no parabola.
    """
    points = [(math.log10(lr), sign * t.value) for t in trials if t.value is not None and (lr := rate_of(t))]
    if not points:
        return None
    best = min(score for _, score in points)
    limit = (best + sign * base) / 2 if base is not None and sign * base > best else math.inf
    near = [(x, score) for x, score in points if score <= limit]
    if len({x for x, _ in near}) < MIN_FIT_TRIALS:
        return None
    xs, scores = (np.array(column) for column in zip(*near, strict=True))
    curvature, slope, _ = (float(c) for c in np.polyfit(xs, scores, 2))
    vertex = -slope / (2 * curvature) if curvature > 0 else math.inf
    if not xs.min() <= vertex <= xs.max():
        return None
    lowest = float(np.polyval(np.polyfit(xs, scores, 2), vertex))
    return Parabola(
        curvature=curvature, lr=10**vertex, lowest=lowest, low=float(10 ** xs.min()), high=float(10 ** xs.max())
    )


def sentences_of(rates: Sequence[RateAdvice], trends: Sequence[RateTrend]) -> list[str]:
    """Returns what to know about learning rates and α/r, a sentence or two per arm."""
    return [*(_rate_sentence(rate) for rate in rates), *(_trend_sentence(trend) for trend in trends)]


def _advise_rate(arm: Arm, data: SweepData, full: RateAdvice | None) -> RateAdvice | None:
    tolerance, best = tolerance_of(arm, data), arm.best
    lr = rate_of(best) if best and LR in best.params else None
    if best is None or lr is None or tolerance is None:
        return None
    near = near_best(arm, data, tolerance)
    lrs = [value for trial in near if (value := rate_of(trial))]
    fit = fit_arm(arm, data)
    low, high = _flat_range(fit, lrs, tolerance.width)
    scales = [scale for trial in near if (scale := scale_of(trial)) is not None]
    return RateAdvice(
        arm=arm.name,
        lr=lr,
        fitted_lr=fit.lr if fit else None,
        low=low,
        high=high,
        is_edge=LR in edges_of(arm, best),
        tolerance=tolerance.source,
        ratio_to_full=_ratio(fit, lr, full) if full else None,
        ratio_interval=(low / full.high, high / full.low) if full else None,
        scaling=SQRT if best.setting(SCALING) == SQRT else "alpha_over_rank",
        scale=scale_of(best),
        scale_range=(min(scales), max(scales)) if scales and len(set(scales)) > 1 else None,
    )


def rate_of(trial: Trial) -> float | None:
    """Returns a trial's learning rate, if it is one."""
    lr = trial.number_at(LR)
    return lr if lr is not None and lr > 0 else None


def scale_of(trial: Trial) -> float | None:
    """Returns α/r of a trial that has both, or α/√r where its α scales by that."""
    alpha, rank = trial.number_at(ALPHA), trial.number_at(RANK)
    if alpha is None or rank is None or rank <= 0:
        return None
    return alpha / (math.sqrt(rank) if trial.setting(SCALING) == SQRT else rank)


def _flat_range(fit: Parabola | None, lrs: Sequence[float], width: float) -> tuple[float, float]:
    low, high = min(lrs), max(lrs)
    if fit is None:
        return low, high
    reach = math.sqrt(width / fit.curvature)
    # what was tried counts, and the fit reaches no further than its trials
    return (
        min(low, max(fit.low, fit.lr / 10**reach)),
        max(high, min(fit.high, fit.lr * 10**reach)),
    )


def _ratio(fit: Parabola | None, lr: float, full: RateAdvice) -> float:
    return fit.lr / full.fitted_lr if fit and full.fitted_lr else lr / full.lr


def _fit_trend(group: Sequence[Arm], best: dict[str, float]) -> RateTrend:
    ranks = [rank_of(arm) or 1.0 for arm in group]
    lrs = [best[arm.name] for arm in group]
    line = stats.linregress(np.log(ranks), np.log(lrs))
    return RateTrend(
        arms=tuple(arm.name for arm in group),
        ranks=tuple(ranks),
        lrs=tuple(lrs),
        exponent=float(line.slope),
        exponent_error=float(line.stderr) if len(group) > 2 else None,
    )


def _rate_sentence(rate: RateAdvice) -> str:
    lr, span = format_setting(rate.fitted_lr or rate.lr), rate.high / rate.low
    flat = (
        f"from {format_setting(rate.low)} to {format_setting(rate.high)} (a factor of {format_ratio(span)}) "
        f"scores stay within {rate.tolerance}"
        if span > 1.005
        else f"no other that was tried scores within {rate.tolerance}"
    )
    edge = "; it lies at an end of its range" if rate.is_edge else ""
    return f"The best learning rate of `{rate.arm}` is {lr}{edge}; {flat}.{_full_words(rate)}{_scale_words(rate)}"


def _full_words(rate: RateAdvice) -> str:
    if rate.ratio_to_full is None or rate.ratio_interval is None:
        return ""
    low, high = (format_ratio(end) for end in rate.ratio_interval)
    between = f" (between {low} and {high})" if low != high else ""
    return f" That is {format_ratio(rate.ratio_to_full)} times full fine-tuning's{between}."


def _scale_words(rate: RateAdvice) -> str:
    if rate.scale is None:
        return ""
    ends = rate.scale_range
    among = f"; trials as good have {format_ratio(ends[0])} to {format_ratio(ends[1])}" if ends else ""
    return f" Its {'α/√r' if rate.scaling == SQRT else 'α/r'} is {format_ratio(rate.scale)}{among}."


def _trend_sentence(trend: RateTrend) -> str:
    points = zip(trend.ranks, trend.lrs, strict=True)
    listed = join_words([f"{format_setting(lr)} at rank {format_setting(rank)}" for rank, lr in points])
    error = f" ± {trend.exponent_error:.2f}" if trend.exponent_error is not None else ""
    return f"Over rank the best learning rate moves like rank^{trend.exponent:.2f}{error}: {listed}."
