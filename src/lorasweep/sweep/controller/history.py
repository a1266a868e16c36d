"""An arm's earlier trials as its sampler sees them. Each change of a trial updates them.

An arm may have 100,000 trials, and a proposal uses a few hundred of them. So a change of one trial never makes this
module read all of them again.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.data import Direction
from lorasweep.sweep.definition.space import Space

MAX_HISTORY_TRIALS = 200
"""Results that a model sees. The cost of a Gaussian process grows with the cube of their number: at 200 a proposal
takes about 0.5 s (TPE: 0.04 s), at 500 about 3 s."""
MAX_REPEAT_FRACTION = 0.01
"""Two values of a continuous range that differ by at most this fraction of the larger one count as equal."""

Point = dict[str, Any]
"""One value per key that has more than one; a choice is its position."""
Rank = tuple[int, int, float]
"""Sort key of a result, best first."""


@dataclass(frozen=True, kw_only=True)
class HistoryTrial:
    """A trial whose parameters lie in the space, with its point. `rank` is None if the trial has no result."""

    trial: FrozenTrial
    point: Point
    is_paused: bool
    rank: Rank | None
    has_value: bool

    @property
    def state(self) -> TrialState:
        """Returns the trial's state; a paused one is pruned, because it is a result of fewer steps."""
        return TrialState.PRUNED if self.is_paused else self.trial.state


class History:
    """An arm's earlier trials.

    COMPLETE: has its value. PRUNED, or RUNNING with intermediate values: a partial result. PRUNED with a violated
    constraint: does not fit in memory. RUNNING without intermediate values: no result yet. FAIL: teaches nothing, and
    is not repeated. Intermediate values are of the same metric as values. A trial that has not exactly the space's
    keys, each with a value of its range, is ignored.
    """

    def __init__(self, space: Space, trials: Iterable[FrozenTrial] = (), *, direction: Direction) -> None:
        """Takes the trials in the order of their numbers, from 0."""
        self.coding = Coding(space)
        self.direction = direction
        self.tried = TriedPoints(self.coding.ranges)
        self.num_values = 0
        """Results that have a finite value."""
        self._trials: dict[int, HistoryTrial] = {}
        self._ranked: list[tuple[Rank, int]] = []
        """Rank and number of all results, best first."""
        self._numbers: list[int] = []
        """Numbers of all results, ascending."""
        self._running: dict[int, Point] = {}
        """Points of running trials without a result, by number."""
        for number, trial in enumerate(trials):
            self.update(number, trial)

    def update(self, number: int, trial: FrozenTrial, *, is_paused: bool = False) -> None:
        """Adds a trial, or replaces it by what it is now.

        Args:
            number: Its number.
            trial: As the study has it.
            is_paused: Whether it is paused: a result of fewer steps.
        """
        before = self._trials.get(number)
        point = before.point if before is not None else self.coding.encode(trial.params)
        if point is None:
            return
        if before is None:
            self.tried.add(point)
        value = last_value(trial)
        is_result = trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) and (
            value is not None or is_infeasible(trial)
        )
        now = HistoryTrial(
            trial=trial,
            point=point,
            is_paused=is_paused,
            rank=rank(trial, direction=self.direction) if is_result else None,
            has_value=is_result and value is not None,
        )
        self._trials[number] = now
        self._place(number, None if before is None else before.rank, now.rank)
        self.num_values += now.has_value - (before is not None and before.has_value)
        if trial.state == TrialState.RUNNING and not is_paused and not is_result:
            self._running[number] = point
        else:
            self._running.pop(number, None)

    def trials(self) -> list[HistoryTrial]:
        """Returns all trials in the order of their numbers."""
        return [self._trials[number] for number in sorted(self._trials)]

    def results(self) -> list[tuple[FrozenTrial, Point]]:
        """Returns at most `MAX_HISTORY_TRIALS` results in their order: the best half, and the latest of the others."""
        numbers = self._numbers
        if len(numbers) > MAX_HISTORY_TRIALS:
            chosen = {number for _, number in self._ranked[: MAX_HISTORY_TRIALS // 2]}
            for number in reversed(numbers):
                if len(chosen) == MAX_HISTORY_TRIALS:
                    break
                chosen.add(number)
            numbers = sorted(chosen)
        return [(self._trials[number].trial, self._trials[number].point) for number in numbers]

    def running(self) -> list[Point]:
        """Returns the points of the running trials that have no result yet, in the order of their numbers."""
        return [self._running[number] for number in sorted(self._running)]

    def _place(self, number: int, before: Rank | None, now: Rank | None) -> None:
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


class Coding:
    """Turns an arm's parameters into points and back. Keys are sorted: their order in the file changes nothing."""

    def __init__(self, space: Space) -> None:
        self.space: Space = {key: space[key] for key in sorted(space)}
        self.choices: dict[str, list[Any]] = {}
        """Per key with a list of choices, the choices by position."""
        self.ranges: Space = {}
        """Optuna's range for each key that has more than one value."""
        for key, distribution in self.space.items():
            encoded = distribution
            if isinstance(distribution, CategoricalDistribution):
                self.choices[key], is_ordered = _order_choices(distribution.choices)
                count = len(distribution.choices)
                encoded = IntDistribution(0, count - 1) if is_ordered else CategoricalDistribution(range(count))
            if not encoded.single():
                self.ranges[key] = encoded
        # by their text, because 1, 1.0 and True are equal
        self._positions = {
            key: {repr(choice): position for position, choice in enumerate(choices)}
            for key, choices in self.choices.items()
        }

    def encode(self, params: Mapping[str, Any]) -> Point | None:
        """Returns the point of a trial's parameters; None unless they are a point of this space."""
        if params.keys() != self.space.keys():
            return None
        point: Point = {}
        for key, distribution in self.space.items():
            value = params[key]
            if key in self.choices:
                value = self._positions[key].get(repr(value))
                if value is None:
                    return None
            elif isinstance(distribution, FloatDistribution | IntDistribution) and not (
                distribution.low <= value <= distribution.high
            ):
                return None
            if key in self.ranges:
                point[key] = value
        return point

    def decode(self, point: Point) -> dict[str, Any]:
        """Returns the parameters of a point, choices as the user wrote them."""
        params: dict[str, Any] = {}
        for key, distribution in self.space.items():
            if key in self.choices:
                params[key] = self.choices[key][point.get(key, 0)]
            elif isinstance(distribution, FloatDistribution | IntDistribution):
                params[key] = point.get(key, distribution.low)
        return params


def _order_choices(choices: Iterable[Any]) -> tuple[list[Any], bool]:
    """Returns choices in an order that doesn't depend on the file's, and whether they are ascending numbers."""
    listed = list(choices)
    if all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in listed):
        return sorted(listed, key=lambda choice: (choice, repr(choice))), True
    return sorted(listed, key=lambda choice: (type(choice).__name__, repr(choice))), False


class TriedPoints:
    """The points of earlier trials; `point in tried` says whether a point repeats one."""

    def __init__(self, ranges: Space, points: Iterable[Point] = ()) -> None:
        self._continuous = [
            key for key, range_ in ranges.items() if isinstance(range_, FloatDistribution) and range_.step is None
        ]
        self._discrete = [key for key in ranges if key not in self._continuous]
        self._tried: defaultdict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
        """Continuous values of all points with the same discrete ones, in ascending order."""
        for point in points:
            self.add(point)

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
        near = range(bisect_left(others, [values[0] - width]), len(others))
        for other in (others[index] for index in near):
            if other[0] > values[0] + width:
                return False
            if all(abs(a - b) <= MAX_REPEAT_FRACTION * max(abs(a), abs(b)) for a, b in zip(values, other, strict=True)):
                return True
        return False

    def _discrete_values(self, point: Point) -> tuple[Any, ...]:
        return tuple(point[key] for key in self._discrete)


def is_infeasible(trial: FrozenTrial) -> bool:
    """Whether a trial does not fit in memory."""
    return any(excess > 0 for excess in trial.constraints.values())


def last_value(trial: FrozenTrial) -> float | None:
    """Returns a trial's value, or its last intermediate one; None where there is none that is finite."""
    if is_infeasible(trial):
        return None
    value = trial.value
    if value is None and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return value if value is not None and math.isfinite(value) else None


def rank(trial: FrozenTrial, *, direction: Direction) -> Rank:
    """Returns the sort key of a result, best first: complete ones, then partial ones by how far they came (as TPE)."""
    value = last_value(trial)
    if value is None:
        return 2, 0, 0.0
    cost = value if direction == "minimize" else -value
    return (0, 0, cost) if trial.state == TrialState.COMPLETE else (1, -max(trial.intermediate_values), cost)
