"""An arm's earlier trials as its sampler sees them.

An arm may have 100,000 trials, and a proposal uses a few hundred of them. Only changed trials are read again.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.data import Direction
from lorasweep.sweep.controller.encoding import Point, SpaceEncoding
from lorasweep.sweep.controller.rate_law import RateLaw
from lorasweep.sweep.definition.space import Space

MAX_HISTORY_TRIALS = 200
"""Number of results that a model sees. The cost of a Gaussian process grows with the cube of this number: at 200 a
proposal takes about 0.5 s (TPE: 0.04 s), at 500 about 3 s."""
SortKey = tuple[int, int, float]
"""Sort key of a result, best first."""
INFEASIBLE_SORT_KEY: SortKey = (2, 0, 0.0)


class History:
    """An arm's earlier trials.

    A model sees each trial by its state in Optuna:

    - COMPLETE: a result.
    - PRUNED, or RUNNING with intermediate values: a partial result.
    - PRUNED with a violated constraint: the trial does not fit in memory.
    - RUNNING without intermediate values: no result yet.
    - FAIL: hidden from the model. The trial's point is not proposed again.
    """

    def __init__(
        self, space: Space, trials: Iterable[FrozenTrial] = (), *, direction: Direction, law: RateLaw | None = None
    ) -> None:
        """Reads an arm's trials; `direction` says which scores are better, `law` which coordinate the rates have."""
        self.encoding = SpaceEncoding(space, law=law)
        self.direction = direction
        self._trials: dict[int, FrozenTrial] = {}
        """Copies of all trials, with points in place of parameters, in the order of their numbers."""
        self._sort_keys: dict[int, SortKey] = {}
        """The sort key of each result by its trial's number."""
        self._sorted: list[tuple[SortKey, int]] = []
        """Sort key and number of each result, best first."""
        self._running: set[int] = set()
        """Numbers of the running trials without a result."""
        self._tried: set[tuple[Any, ...]] = set()
        for number, trial in enumerate(trials):
            self.update(number, trial)

    def update(self, number: int, trial: FrozenTrial, *, is_paused: bool = False) -> None:
        """Adds a trial, or replaces its earlier state. New trials must be added in the order of their numbers."""
        trial = copy.copy(trial)  # so that the study's trial keeps its attributes
        if is_paused:  # a sampler reads a pruned trial as a result of fewer steps
            trial.state = TrialState.PRUNED
        trial.params = self._trials[number].params if number in self._trials else self.encoding.encode(trial.params)
        trial.distributions = self.encoding.ranges
        self._trials[number] = trial
        self._tried.add(self._round(trial.params))
        if number in self._sort_keys:
            del self._sorted[bisect_left(self._sorted, (self._sort_keys.pop(number), number))]
        self._running.discard(number)
        sort_key = self._get_sort_key(trial)
        if sort_key is not None:
            self._sort_keys[number] = sort_key
            insort(self._sorted, (sort_key, number))
        elif trial.state == TrialState.RUNNING:
            self._running.add(number)

    @property
    def num_values(self) -> int:
        """Number of results that have a finite value."""
        return bisect_left(self._sorted, (INFEASIBLE_SORT_KEY, -1))

    def list_all(self) -> list[FrozenTrial]:
        return list(self._trials.values())

    def list_results(self) -> list[FrozenTrial]:
        """Returns the results in the order of their numbers: all, or `MAX_HISTORY_TRIALS` of them if there are more.

        One half of the returned results are the best results. The other half are the latest of the remaining results.
        """
        if len(self._sort_keys) <= MAX_HISTORY_TRIALS:
            return [self._trials[number] for number in sorted(self._sort_keys)]
        max_best = MAX_HISTORY_TRIALS // 2
        best = {number for _, number in self._sorted[:max_best]}
        others = (number for number in reversed(self._trials) if number in self._sort_keys and number not in best)
        latest = itertools.islice(others, MAX_HISTORY_TRIALS - len(best))
        return [self._trials[number] for number in sorted([*best, *latest])]

    def list_running(self) -> list[FrozenTrial]:
        """Returns the running trials without a result, in the order of their numbers."""
        return [self._trials[number] for number in sorted(self._running)]

    def has_tried(self, point: Point) -> bool:
        """Returns whether a trial had this point. Values of continuous ranges are compared to two digits."""
        return self._round(point) in self._tried

    def _get_sort_key(self, trial: FrozenTrial) -> SortKey | None:
        """Returns the sort key of a trial that is a result, else None.

        Complete trials come first, then partial results with the most steps first (as in TPE), then infeasible trials.
        """
        if trial.state == TrialState.FAIL:
            return None
        value = last_value(trial)
        if value is None:
            return INFEASIBLE_SORT_KEY if _is_infeasible(trial) else None
        cost = value if self.direction == "minimize" else -value
        if trial.state == TrialState.COMPLETE:
            return 0, 0, cost
        return 1, -max(trial.intermediate_values), cost

    def _round(self, point: Point) -> tuple[Any, ...]:
        """Returns a point's values. Values of continuous ranges are rounded to two significant digits."""
        return tuple(
            f"{point[key]:.2g}" if isinstance(range_, FloatDistribution) and range_.step is None else point[key]
            for key, range_ in self.encoding.ranges.items()
        )


def extrapolate_scores(results: Sequence[FrozenTrial]) -> list[float | None]:
    """Returns the score of each result; of a partial result, its last value plus the median progress of others."""
    complete = [trial for trial in results if trial.state == TrialState.COMPLETE]
    scores: list[float | None] = []
    for trial in results:
        score = last_value(trial)
        if score is not None and trial.state != TrialState.COMPLETE:
            step = max(trial.intermediate_values)
            progress = [
                end - start
                for peer in complete
                if math.isfinite(start := peer.intermediate_values.get(step, math.nan))
                and (end := last_value(peer)) is not None
            ]
            score += statistics.median(progress) if progress else 0.0
        scores.append(score)
    return scores


def last_value(trial: FrozenTrial) -> float | None:
    """Returns a trial's score or else its last intermediate value; None if it is missing, not finite or infeasible."""
    if _is_infeasible(trial):
        return None
    value = trial.value
    if value is None and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return value if value is not None and math.isfinite(value) else None


def _is_infeasible(trial: FrozenTrial) -> bool:
    """Returns whether a trial does not fit in memory."""
    return any(excess > 0 for excess in trial.constraints.values())
