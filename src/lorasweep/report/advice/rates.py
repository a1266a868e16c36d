"""The best learning rate of each arm, the range that is as good, its ratio to full fine-tuning's, and its α/r."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lorasweep.report.advice.edges import find_edges
from lorasweep.report.advice.tolerance import find_tolerance, near_best
from lorasweep.report.sweep_data import ALPHA, LR, RANK, ArmData, SweepData, TrialData, group_by_rank
from lorasweep.wording import format_ratio, format_setting, join_words

MIN_RANK_RATIO = 4.0
"""A trend over rank is fitted only if the highest rank is at least this many times the lowest."""
SCALING, SQRT = "method.scaling", "alpha_over_sqrt_rank"


@dataclass(frozen=True, kw_only=True)
class RateAdvice:
    """The best learning rate of one arm."""

    arm: str
    lr: float
    """The learning rate of the best trial."""
    low: float
    """The lowest learning rate of the trials that score as well as the best, within the tolerance."""
    high: float
    """The highest learning rate of those trials."""
    is_edge: bool
    """Whether the best lies at an end of its range, so that a better one may lie outside."""
    tolerance: str
    """The quantity within which a score is as good."""
    ratio_to_full: float | None
    """The best learning rate over full fine-tuning's."""
    scaling: str
    """The rule by which α scales the change: `alpha_over_rank`, or rsLoRA's `alpha_over_sqrt_rank`."""
    scale: float | None
    """α/r of the best trial, or α/√r under rsLoRA."""

    @property
    def sentence(self) -> str:
        """The advice in words."""
        edge = "; it lies at an end of its range" if self.is_edge else ""
        near = (
            f"from {format_setting(self.low)} to {format_setting(self.high)} "
            f"(a factor of {format_ratio(self.high / self.low)}) scores stay within {self.tolerance}"
            if self.high > 1.005 * self.low
            else f"no other that was tried scores within {self.tolerance}"
        )
        ratio = f" That is {format_ratio(self.ratio_to_full)} times full fine-tuning's." if self.ratio_to_full else ""
        name = "α/√r" if self.scaling == SQRT else "α/r"
        scale = f" Its {name} is {format_ratio(self.scale)}." if self.scale is not None else ""
        return f"The best learning rate of `{self.arm}` is {format_setting(self.lr)}{edge}; {near}.{ratio}{scale}"


@dataclass(frozen=True, kw_only=True)
class RateTrend:
    """The change of the best learning rate over arms that differ in rank alone."""

    arms: tuple[str, ...]
    ranks: tuple[float, ...]
    lrs: tuple[float, ...]
    exponent: float
    """The slope of log lr over log rank: lr ∝ rank^exponent. 0 is constant, -0.5 is 1/√r."""
    exponent_error: float | None
    """The standard error of `exponent`; None for two ranks."""

    @property
    def sentence(self) -> str:
        """The trend in words."""
        points = zip(self.ranks, self.lrs, strict=True)
        listed = join_words([f"{format_setting(lr)} at rank {format_setting(rank)}" for rank, lr in points])
        error = f" ± {self.exponent_error:.2f}" if self.exponent_error is not None else ""
        return f"Over rank the best learning rate moves like rank^{self.exponent:.2f}{error}: {listed}."


def advise_rates(data: SweepData) -> list[RateAdvice]:
    """Returns the best learning rate of each arm that swept it."""
    full = data.best_arm("full")
    full_lr = positive_lr(full.best) if full and full.best and LR in full.best.params else None
    return [advice for arm in data.arms if (advice := _advise_rate(arm, data, None if arm is full else full_lr))]


def fit_trends(data: SweepData, rates: Sequence[RateAdvice]) -> list[RateTrend]:
    """Returns the change of the best learning rate over rank in each group of arms that differ in rank alone."""
    best = {rate.arm: rate.lr for rate in rates}
    trends = []
    for group in group_by_rank(arm for arm in data.arms if arm.name in best):
        ranks, lrs = [arm.rank or 1.0 for arm in group], [best[arm.name] for arm in group]
        if max(ranks) < MIN_RANK_RATIO * min(ranks):
            continue
        line = stats.linregress(np.log(ranks), np.log(lrs))
        trends.append(
            RateTrend(
                arms=tuple(arm.name for arm in group),
                ranks=tuple(ranks),
                lrs=tuple(lrs),
                exponent=float(line.slope),
                # The slope through equal learning rates is exact, but scipy divides 0 by 0 for its error.
                exponent_error=float(np.nan_to_num(line.stderr)) if len(group) > 2 else None,
            )
        )
    return trends


def positive_lr(trial: TrialData) -> float | None:
    """Returns a trial's learning rate if it is a positive number, else None."""
    lr = trial.number_at(LR)
    return lr if lr is not None and lr > 0 else None


def _advise_rate(arm: ArmData, data: SweepData, full_lr: float | None) -> RateAdvice | None:
    tolerance, best = find_tolerance(arm, data), arm.best
    lr = positive_lr(best) if best and LR in best.params else None
    if best is None or lr is None or tolerance is None:
        return None
    lrs = [value for trial in near_best(arm, data, tolerance) if (value := positive_lr(trial))]
    return RateAdvice(
        arm=arm.name,
        lr=lr,
        low=min(lrs),
        high=max(lrs),
        is_edge=LR in find_edges(arm, best),
        tolerance=tolerance.source,
        ratio_to_full=lr / full_lr if full_lr else None,
        scaling=SQRT if best.setting(SCALING) == SQRT else "alpha_over_rank",
        scale=_scale_of(best),
    )


def _scale_of(trial: TrialData) -> float | None:
    alpha, rank = trial.number_at(ALPHA), trial.number_at(RANK)
    if alpha is None or rank is None or rank <= 0:
        return None
    return alpha / (math.sqrt(rank) if trial.setting(SCALING) == SQRT else rank)
