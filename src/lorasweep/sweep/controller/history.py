"""An arm's earlier trials as its sampler sees them.

An arm may have 100,000 trials, and a proposal uses a few hundred of them. So a trial that changes is read again, and
no other one.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.data import Direction
from lorasweep.sweep.controller.encoding import Point, SpaceEncoding
from lorasweep.sweep.definition.space import Space

MAX_HISTORY_TRIALS = 200
"""Number of results that a model sees. The cost of a Gaussian process grows with the cube of this number: at 200 a
proposal takes about 0.5 s (TPE: 0.04 s), at 500 about 3 s."""
MAX_REPEAT_FRACTION = 0.01
"""Two values of a continuous range that differ by at most this fraction of the larger one count as equal."""
Result = tuple[FrozenTrial, Point]
Rank = tuple[int, int, float]
"""Sort key of a result, best first."""


class History:
    """An arm's earlier trials.

    COMPLETE: a result. PRUNED, or RUNNING with intermediate values: a partial result. PRUNED with a violated
    constraint: does not fit in memory. RUNNING without intermediate values: no result yet. FAIL: a model does not see
    it, but it is not repeated.
    """

    def __init__(self, space: Space, trials: Iterable[FrozenTrial] = (), *, direction: Direction) -> None:
        """Takes the arm's space and its trials in the order of their numbers, from 0."""
        self.encoding = SpaceEncoding(space)
        self.direction = direction
        self.tried = TriedPoints(self.encoding.ranges)
        self.num_values = 0
        """Number of results that have a finite value."""
        self._trials: dict[int, Result] = {}
        self._ranks: dict[int, Rank] = {}
        """The rank of each result by its trial's number."""
        self._ranked: list[tuple[Rank, int]] = []
        """Rank and number of each result, best first."""
        self._numbers: list[int] = []
        """Numbers of the results, ascending."""
        self._running: set[int] = set()
        """Numbers of the running trials without a result."""
        for number, trial in enumerate(trials):
            self.update(number, trial)

    def update(self, number: int, trial: FrozenTrial, *, is_paused: bool = False) -> None:
        """Adds a trial, or replaces it by its present state.

        Args:
            number: The trial's number.
            trial: The trial as the study has it.
            is_paused: Whether it is paused: then it is pruned for a sampler, because it is a result of fewer steps.
        """
        if is_paused:
            trial = copy.copy(trial)  # the study's own trial still runs
            trial.state = TrialState.PRUNED
        if number in self._trials:
            before, point = self._trials[number]
            self.num_values -= _has_value(before)
        else:
            point = self.encoding.encode(trial.params)
            self.tried.add(point)
        self._trials[number] = trial, point
        self.num_values += _has_value(trial)
        is_result = trial.state != TrialState.FAIL and (is_infeasible(trial) or _has_value(trial))
        self._place(number, rank_result(trial, direction=self.direction) if is_result else None)
        if trial.state == TrialState.RUNNING and not is_result:
            self._running.add(number)
        else:
            self._running.discard(number)

    def all(self) -> list[Result]:
        """Returns all trials in the order of their numbers."""
        return [self._trials[number] for number in sorted(self._trials)]

    def results(self) -> list[Result]:
        """Returns at most `MAX_HISTORY_TRIALS` results in their order: the best half, and the latest of the others."""
        numbers = self._numbers
        if len(numbers) > MAX_HISTORY_TRIALS:
            chosen = {number for _, number in self._ranked[: MAX_HISTORY_TRIALS // 2]}
            for number in reversed(numbers):
                if len(chosen) == MAX_HISTORY_TRIALS:
                    break
                chosen.add(number)
            numbers = sorted(chosen)
        return [self._trials[number] for number in numbers]

    def running(self) -> list[Point]:
        """Returns the points of the running trials without a result, in the order of their numbers."""
        return [self._trials[number][1] for number in sorted(self._running)]

    def _place(self, number: int, now: Rank | None) -> None:
        """Moves a trial to its place in the sorted lists of results."""
        before = self._ranks.pop(number, None)
        if now is not None:
            self._ranks[number] = now
        if before == now:
            return
        if before is not None:
            del self._ranked[bisect_left(self._ranked, (before, number))]
        if now is not None:
            insort(self._ranked, (now, number))
        if before is None:
            insort(self._numbers, number)
        elif now is None:
            del self._numbers[bisect_left(self._numbers, number)]


class TriedPoints:
    """The points of earlier trials.

    `point in tried` is true if the point has the discrete values of an earlier one and continuous values near its own.
    """

    def __init__(self, ranges: Space) -> None:
        self._continuous = [
            key for key, range_ in ranges.items() if isinstance(range_, FloatDistribution) and range_.step is None
        ]
        self._discrete = [key for key in ranges if key not in self._continuous]
        self._tried: defaultdict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
        """The continuous values of all points with the same discrete ones, ascending."""

    def add(self, point: Point) -> None:
        """Adds a point."""
        insort(self._tried[self._discrete_values(point)], [point[key] for key in self._continuous])

    def __contains__(self, point: Point) -> bool:
        values = [point[key] for key in self._continuous]
        others = self._tried.get(self._discrete_values(point), [])
        if not values:
            return bool(others)
        # a little wider than what can be near: the larger of two values is at most |first| / (1 - fraction)
        width = 1.001 * MAX_REPEAT_FRACTION / (1 - MAX_REPEAT_FRACTION) * abs(values[0])
        for place in range(bisect_left(others, [values[0] - width]), len(others)):
            other = others[place]
            if other[0] > values[0] + width:
                return False
            if all(abs(a - b) <= MAX_REPEAT_FRACTION * max(abs(a), abs(b)) for a, b in zip(values, other, strict=True)):
                return True
        return False

    def _discrete_values(self, point: Point) -> tuple[Any, ...]:
        return tuple(point[key] for key in self._discrete)


def is_infeasible(trial: FrozenTrial) -> bool:
    """Returns whether a trial does not fit in memory."""
    return any(excess > 0 for excess in trial.constraints.values())


def last_value(trial: FrozenTrial) -> float | None:
    """Returns a trial's value, or its last intermediate one; None if there is none that is finite."""
    if is_infeasible(trial):
        return None
    value = trial.value
    if value is None and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return value if value is not None and math.isfinite(value) else None


def rank_result(trial: FrozenTrial, *, direction: Direction) -> Rank:
    """Returns the sort key of a result, best first: complete ones, then partial ones by how far they came (as TPE)."""
    value = last_value(trial)
    if value is None:
        return 2, 0, 0.0
    cost = value if direction == "minimize" else -value
    return (0, 0, cost) if trial.state == TrialState.COMPLETE else (1, -max(trial.intermediate_values), cost)


def _has_value(trial: FrozenTrial) -> bool:
    return trial.state != TrialState.FAIL and last_value(trial) is not None
