"""An arm's trials as points that samplers search: converts parameters to points and back, and draws Sobol points.

A point has the index of a choice instead of the choice. Choices that are numbers are sorted, so that a model knows that
rank 8 lies between 4 and 16. Other choices are categories. A learning rate that is searched on a log scale becomes the
coordinate u of the rate law.

The rate law: in the coordinate u = lr · √(s · r · λ), LoRA's best learning rate is about the same at every rank. s is
the factor on B A (α/r, or α/√r), r the rank, and λ the ratio of the learning rates of B and A (LoRA+). With α/r the
coordinate is lr · √α. Under Adam both A and B move by about lr a step, so after t steps the update has grown like
s · r · (lr · t)². docs/benchmarks.md compares other powers on stored results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState
from scipy.stats import qmc

from lorasweep.config.build import as_settings, flatten
from lorasweep.config.components import Component
from lorasweep.config.data import ScoreMetric
from lorasweep.config.method import scaling_factor
from lorasweep.config.run import ALPHA, LR, RANK, SCALING
from lorasweep.record import Trial, TrialState
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.ranges import Range, Space

Point = dict[str, Any]
"""A value for each key that can vary. For a list of choices the value is the index of a choice."""
RATIO_B = "optim.lr_ratio_b"
LAW_KEYS = (RANK, ALPHA, SCALING, RATIO_B)
"""The swept keys that change the factor between the learning rate and u."""

MAX_HISTORY_TRIALS = 200
"""Number of results, and of running trials, that a model sees. The cost of a Gaussian process grows with the cube of
this number: at 200 a proposal takes about 0.5 s (TPE: 0.04 s), at 500 about 3 s."""
OPTUNA_STATES: Mapping[TrialState, OptunaState] = {
    "complete": OptunaState.COMPLETE,
    "stopped": OptunaState.PRUNED,  # TPE ranks a pruned trial below all complete ones
    "infeasible": OptunaState.PRUNED,  # with a violated constraint, because a sampler ignores failed trials
    "failed": OptunaState.FAIL,
    "running": OptunaState.RUNNING,
}
"""Optuna's names of the states of trials."""


@dataclass(frozen=True, kw_only=True)
class RateLaw:
    """Computes the factor u / lr of a trial's parameters. Without LoRA it is 1, so that u is the learning rate."""

    defaults: Mapping[str, Any]
    """The values of `LAW_KEYS` that an arm does not sweep; empty for a method without a scaling."""

    def factor(self, params: Mapping[str, Any]) -> float:
        """Returns √(s · r · λ). It is 1 at α = 0, where the learning rate has no effect."""
        if not self.defaults:
            return 1.0
        values = {**self.defaults, **{key: params[key] for key in LAW_KEYS if key in params}}
        scaling = scaling_factor(alpha=values[ALPHA], rank=values[RANK], rule=values[SCALING])
        return math.sqrt(scaling * values[RANK] * values[RATIO_B]) or 1.0


def build_rate_law(arm: Arm) -> RateLaw:
    """Returns the rate law of an arm; none without LoRA, Adam or a searched rate."""
    if LR not in arm.space or not arm.base.follows_rate_law:
        return RateLaw(defaults={})
    settings = flatten(as_settings(arm.base))
    return RateLaw(defaults={key: settings[key] for key in LAW_KEYS})


class SpaceEncoding:
    """Converts an arm's parameters to points and back. Keys are sorted, so their order in the file has no effect."""

    def __init__(self, space: Space, *, law: RateLaw | None = None) -> None:
        self.space: Space = {key: space[key] for key in sorted(space)}
        self._law = law or RateLaw(defaults={})
        self.ranges: Space = {key: range_.encoded for key, range_ in self.space.items() if not range_.is_single}
        """The range of each key in points."""
        rates = self.ranges.get(LR)
        self._rates = rates if rates is not None and rates.log else None
        """The range of the learning rate, if points have u in its place."""
        if self._rates is not None:
            # all combinations of the ends of the swept keys that the factor depends on
            ends = {key: self.space[key].ends for key in LAW_KEYS if key in self.space}
            corners = itertools.product(*ends.values())
            factors = [self._law.factor(dict(zip(ends, values, strict=True))) for values in corners]
            low, high = self._rates.low * min(factors), self._rates.high * max(factors)
            self.ranges[LR] = Range(low=low, high=high, log=True)
        self.distributions = {key: range_.distribution for key, range_ in self.ranges.items()}
        """`ranges` as Optuna's samplers read them."""

    def encode(self, params: Mapping[str, Any]) -> Point:
        point = {key: self.space[key].encode(params[key]) for key in self.ranges}
        if self._rates is not None:
            point[LR] = params[LR] * self._law.factor(params)
        return point

    def decode(self, point: Point) -> dict[str, Any]:
        params = {
            key: range_.decode(point[key]) if key in self.ranges else range_.ends[0]
            for key, range_ in self.space.items()
        }
        if self._rates is not None:
            rate = point[LR] / self._law.factor(params)
            params[LR] = min(max(rate, self._rates.low), self._rates.high)
        return params

    def move_into_range(self, point: Point, fraction: float) -> Point:
        """Returns the point if its learning rate is in range. Else u is that of the rate at `fraction` of the range."""
        if self._rates is None:
            return point
        factor = self._law.factor(self.decode(point))
        low, high = self._rates.low * factor, self._rates.high * factor
        return point if low <= point[LR] <= high else {**point, LR: low * (high / low) ** fraction}


def draw_sobol_point(encoding: SpaceEncoding, index: int, *, seed: int) -> Point:
    """Returns the point at an index of an arm's Sobol sequence.

    The coordinates equal those of Optuna's QMC sampler. That sampler draws all earlier points again for each point.

    *Differs* for choices: each of k choices appears exactly once in each group of k successive points. The point with
    the lowest coordinate of the group gets the first choice. Optuna cuts the coordinate into k equal parts, but Sobol
    points cover only 2^n parts evenly: with 6 ranks, 81 % of the sequences lack a rank in the first 6 points.
    Points cover u of the rate law where the range of the learning rate allows it, elsewhere the learning rate.
    """
    counts = {key: count for key in encoding.ranges if (count := len(encoding.space[key].choices))}
    # SciPy wants a power of 2. It must include the last point of the group of k points that `index` is in.
    num_points = 1 << (index + max(counts.values(), default=1)).bit_length()
    fractions = _draw_sequence(len(encoding.ranges), seed, num_points)
    point: Point = {}
    for column, (key, range_) in enumerate(encoding.ranges.items()):
        if key in counts:
            first = index - index % counts[key]
            group = fractions[first : first + counts[key], column]
            point[key] = int((group < fractions[index, column]).sum())
        else:
            point[key] = range_.interpolate(float(fractions[index, column]))
    if LR not in encoding.ranges:
        return point
    return encoding.move_into_range(point, float(fractions[index, list(encoding.ranges).index(LR)]))


@lru_cache
def _draw_sequence(num_keys: int, seed: int, num_points: int) -> Any:
    """Returns an array (num_points, num_keys) of numbers from 0 to 1."""
    return qmc.Sobol(num_keys, scramble=True, seed=seed).random(num_points)


class History:
    """An arm's trials, with a point of the space that samplers search in place of each trial's parameters.

    A complete trial is a result, and so is a stopped one, with the bad score at which it was stopped. A running trial
    is no result yet. A failed trial is hidden, but its point is not proposed again.
    """

    def __init__(self, arm: Arm, trials: Iterable[Trial] = (), *, metric: ScoreMetric) -> None:
        # the arguments of a sampler by `_target_`, such as `fixed_params`, have learning rates
        law = None if isinstance(arm.sweep_config.sampler, Component) else build_rate_law(arm)
        self.encoding = SpaceEncoding(arm.space, law=law)
        self.metric = metric
        self.trials: list[Trial] = []
        self._points: dict[int, Point] = {}
        """By number. They are kept, because encoding thousands of trials takes longer than a proposal."""
        self._tried: set[tuple[Any, ...]] = set()
        self.update(trials)

    def update(self, trials: Iterable[Trial]) -> None:
        """Replaces the trials. The parameters of a known trial must not have changed."""
        self.trials = list(trials)
        for trial in self.trials[len(self._points) :]:
            self._points[trial.number] = self.encoding.encode(trial.params)
            self._tried.add(self._round(self._points[trial.number]))

    def point(self, trial: Trial) -> Point:
        return self._points[trial.number]

    def list_results(self) -> list[Trial]:
        """Returns the results by number: all, or the `MAX_HISTORY_TRIALS` best if there are more."""
        sign, scores = self.metric.sign, [(trial, get_score(trial)) for trial in self.trials]
        costs = {trial.number: sign * score for trial, score in scores if score is not None}
        results = [trial for trial in self.trials if trial.number in costs or trial.state == "infeasible"]
        best = sorted(results, key=lambda trial: costs.get(trial.number, math.inf))
        return sorted(best[:MAX_HISTORY_TRIALS], key=lambda trial: trial.number)

    def list_running(self) -> list[Trial]:
        """Returns the latest running trials, at most `MAX_HISTORY_TRIALS`."""
        return [trial for trial in self.trials if trial.state == "running"][-MAX_HISTORY_TRIALS:]

    def has_tried(self, point: Point) -> bool:
        """Returns whether a trial had this point. Values of continuous ranges are compared to two digits."""
        return self._round(point) in self._tried

    def build_frozen_trial(self, trial: Trial, **changes: Any) -> FrozenTrial:
        """Returns a trial as Optuna's samplers read it; `changes` replace arguments of `create_trial`."""
        arguments: dict[str, Any] = {
            "state": OPTUNA_STATES[trial.state],
            "value": trial.search_score if trial.state == "complete" else None,
            "params": self.point(trial),
            "distributions": self.encoding.distributions,
            "intermediate_values": dict(trial.values),
            "constraints": {"memory": 1.0} if trial.state == "infeasible" else None,
            "system_attrs": dict(trial.sampler_state.get("trial", {})),
        }
        return create_trial(**arguments | changes)

    def _round(self, point: Point) -> tuple[Any, ...]:
        return tuple(
            f"{point[key]:.2g}" if not range_.choices and range_.step is None else point[key]
            for key, range_ in self.encoding.ranges.items()
        )


def get_score(trial: Trial) -> float | None:
    """Returns the score that a model sees: that of a complete trial, or the last value of a stopped one.

    Returns None for other trials, and if the score is missing or not finite.
    """
    value = {"complete": trial.search_score, "stopped": trial.last_value}.get(trial.state)
    return value if value is not None and math.isfinite(value) else None
