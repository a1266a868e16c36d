"""An arm's trials as its sampler sees them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from lorasweep.config.components import Component
from lorasweep.config.data import Direction, get_sign
from lorasweep.record import Trial, TrialState
from lorasweep.sweep.controller.encoding import Point, SpaceEncoding, build_rate_law
from lorasweep.sweep.definition.arms import Arm

MAX_HISTORY_TRIALS = 200
"""Number of results, and of running trials, that a model sees. The cost of a Gaussian process grows with the cube of
this number: at 200 a proposal takes about 0.5 s (TPE: 0.04 s), at 500 about 3 s."""
OPTUNA_STATES: Mapping[TrialState, OptunaState] = {
    "complete": OptunaState.COMPLETE,
    "paused": OptunaState.PRUNED,  # a sampler reads a pruned trial as a result of fewer steps
    "pruned": OptunaState.PRUNED,
    "infeasible": OptunaState.PRUNED,  # with a violated constraint, because a sampler ignores failed trials
    "failed": OptunaState.FAIL,
    "running": OptunaState.RUNNING,
}
"""How Optuna calls the states of trials; a paused trial is still running in the study."""


class History:
    """An arm's trials, with a point of the space that samplers search in place of each trial's parameters.

    A complete trial is a result. A paused, pruned or evaluated running trial is a partial result. A running trial
    without an evaluation is no result yet. A failed trial is hidden, but its point is not proposed again.
    """

    def __init__(self, arm: Arm, trials: Iterable[Trial] = (), *, direction: Direction) -> None:
        # the arguments of a sampler by `_target_`, such as `fixed_params`, have learning rates
        law = None if isinstance(arm.sweep_config.sampler, Component) else build_rate_law(arm)
        self.encoding = SpaceEncoding(arm.space, law=law)
        self.direction: Direction = direction
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
        """Returns the results in the order of their numbers: all, or the `MAX_HISTORY_TRIALS` best if there are more.

        Complete trials are ranked by score. Partial results rank below them, by their number of steps, as in TPE.
        """
        sign = get_sign(self.direction)

        def sort_key(trial: Trial) -> tuple[float, ...]:
            value = get_last_value(trial)
            steps = math.inf if trial.state == "complete" else trial.step
            return (1, 0, 0.0) if value is None else (0, -steps, sign * value)

        results = sorted((trial for trial in self.trials if is_result(trial)), key=sort_key)
        return sorted(results[:MAX_HISTORY_TRIALS], key=lambda trial: trial.number)

    def list_running(self) -> list[Trial]:
        """Returns the latest running trials without a result, at most `MAX_HISTORY_TRIALS`."""
        running = [trial for trial in self.trials if trial.state == "running" and not is_result(trial)]
        return running[-MAX_HISTORY_TRIALS:]

    def has_tried(self, point: Point) -> bool:
        """Returns whether a trial had this point. Values of continuous ranges are compared to two digits."""
        return self._round(point) in self._tried

    def build_frozen_trial(self, trial: Trial, **changes: Any) -> FrozenTrial:
        """Returns a trial as Optuna's samplers read it; `changes` replace arguments of `create_trial`."""
        arguments: dict[str, Any] = {
            "state": OPTUNA_STATES[trial.state],
            "value": trial.value if trial.state == "complete" else None,
            "params": self.point(trial),
            "distributions": self.encoding.ranges,
            "intermediate_values": dict(trial.values),
            "constraints": {"memory": 1.0} if trial.state == "infeasible" else None,
            "system_attrs": dict(trial.sampler_state.get("trial", {})),
        }
        return create_trial(**arguments | changes)

    def _round(self, point: Point) -> tuple[Any, ...]:
        """Returns a point's values. Values of continuous ranges are rounded to two significant digits."""
        return tuple(
            f"{point[key]:.2g}" if isinstance(range_, FloatDistribution) and range_.step is None else point[key]
            for key, range_ in self.encoding.ranges.items()
        )


def is_result(trial: Trial) -> bool:
    """Returns whether a model sees a trial: it has a finite value, or does not fit in memory."""
    return trial.state == "infeasible" or (trial.state != "failed" and get_last_value(trial) is not None)


def get_last_value(trial: Trial) -> float | None:
    """Returns a complete trial's score or else its last value; None if it is missing, not finite or infeasible."""
    if trial.state == "infeasible":
        return None
    value = trial.value if trial.state == "complete" else trial.last_value
    return value if value is not None and math.isfinite(value) else None


def extrapolate_scores(results: Sequence[Trial]) -> list[float | None]:
    """Returns the score of each result; of a partial result, its last value plus the median progress of others."""
    complete = [trial for trial in results if trial.state == "complete"]
    scores: list[float | None] = []
    for trial in results:
        score = get_last_value(trial)
        if score is not None and trial.state != "complete":
            progress = [
                end - start
                for peer in complete
                if math.isfinite(start := peer.values.get(trial.step, math.nan))
                and (end := get_last_value(peer)) is not None
            ]
            score += statistics.median(progress) if progress else 0.0
        scores.append(score)
    return scores
