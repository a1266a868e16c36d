"""The parameters of an arm's next trial: Sobol points first, then points that TPE or a Gaussian process chooses.

A proposal depends on the sweep's seed, the arm's name, the trial's number and the arm's history alone. It is made on a
fresh in-memory study, so nothing is written and no sampler carries a state from one trial to the next. The rules:

1. Trials below `count_startup_trials`, and all trials before `MIN_RESULTS` results, are scrambled Sobol points.
2. Optuna sees a choice as its position: in a list of numbers in ascending order, so that the model knows that rank 8
   lies between 4 and 16; in any other list as a category.
3. A model sees at most `MAX_HISTORY_TRIALS` results, the best half and the latest of the others, and every running
   trial.
4. A proposal that repeats an earlier trial of the arm is replaced by the first of the next `MAX_SOBOL_DRAWS` Sobol
   points that repeats none. If each of them does, as in a small space without further points, the proposal stays.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from lorasweep.config.sweep import FixedSampler, ModelBasedSampler
from lorasweep.errors import ConfigError, RunError, first_line
from lorasweep.record import Direction
from lorasweep.sweep.space import Space, grid_values

MAX_HISTORY_TRIALS = 200
"""Results that a model sees. The cost of a Gaussian process grows with the cube of their number: at 200 a proposal
takes about 0.5 s (TPE: 0.04 s), at 500 about 3 s."""
MAX_STARTUP_TRIALS = 32
"""Sobol points at the start of an arm of 64 trials or more."""
MIN_RESULTS = 2
"""Results before a model is asked: a single result is neither better nor worse."""
MAX_SOBOL_DRAWS = 20
"""Sobol points that are tried in place of a proposal that repeats an earlier trial."""
MAX_REPEAT_FRACTION = 0.01
"""Two values of a continuous range that differ by at most this fraction of the larger one count as equal."""
MAX_CACHED_ARMS = 256
"""Arms whose Sobol sequence or order of grid points is kept in memory."""

Point = dict[str, Any]
"""One value per key that has more than one; a choice is its position."""


def propose(
    space: Space,
    history: Sequence[FrozenTrial],
    *,
    sampler: ModelBasedSampler | FixedSampler,
    direction: Direction,
    trials: int,
    number: int,
    seed: int,
    arm: str,
) -> dict[str, Any]:
    """Returns the parameters of trial `number` of an arm, from the seed and the history alone.

    Args:
        space: Dotted keys and their ranges.
        history: The arm's earlier trials in the order of their numbers. COMPLETE: has its value. PRUNED, or RUNNING
            with intermediate values: a partial result. PRUNED with a violated constraint: does not fit in memory.
            RUNNING without intermediate values: no result yet. FAIL: teaches nothing, and is not repeated.
            Intermediate values are of the same metric as values. A trial that has not exactly the space's keys, each
            with a value of its range, is ignored.
        sampler: How points are chosen.
        direction: Whether lower or higher values are better.
        trials: Number of trials that the arm gets in all.
        number: Position of the new trial among the arm's trials, from 0.
        seed: The sweep's seed.
        arm: The arm's name.

    Raises:
        ConfigError: The sampler can't be built, can't propose for this space, or the space is continuous under `grid`.
        RunError: The grid has no combination that was not tried.
    """
    coding = Coding(space)
    known = [(trial, point) for trial in history if (point := coding.encode(trial.params)) is not None]
    tried = _TriedPoints(coding.ranges, (point for _, point in known))
    if sampler.name == "grid":
        return _propose_combination(coding, tried, seed=proposal_seed(seed, arm, None), arm=arm)
    if not coding.ranges:
        return coding.decode({})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sobol = _sobol_sequence(
                tuple(coding.ranges.items()), frozenset(coding.choices), proposal_seed(seed, arm, None)
            )
            each_seed = proposal_seed(seed, arm, number)
            results = [(trial, point) for trial, point in known if _is_result(trial)]
            if sampler.name == "random":
                point = _ask(RandomSampler(seed=each_seed), coding.ranges, [], direction=direction)
            elif (
                not isinstance(sampler, ModelBasedSampler)
                or number < count_startup_trials(sampler, trials=trials)
                or sum(_last_value(trial) is not None for trial, _ in results) < MIN_RESULTS
            ):
                point = sobol.point(number)
            else:
                show = _show_to_tpe if sampler.name == "tpe" else _show_to_gp
                seen = show(select_results(results, direction=direction), coding.ranges, direction=direction)
                seen += [
                    create_trial(state=TrialState.RUNNING, params=point, distributions=coding.ranges)
                    for trial, point in known
                    if trial.state == TrialState.RUNNING and not _is_result(trial)
                ]
                point = _ask(_build_model(sampler, seed=each_seed), coding.ranges, seen, direction=direction)
            if point in tried:
                draws = (sobol.point(number + ahead) for ahead in range(MAX_SOBOL_DRAWS))
                point = next((draw for draw in draws if draw not in tried), point)
    except Exception as error:  # whatever a sampler raises: the user needs the sampler's name and another one to use
        raise ConfigError(
            f"`sampler={sampler.name}` must be able to propose a trial for the space of arm {arm!r}, but raised "
            f"{type(error).__name__}: {first_line(error)}. Use `sampler=qmc`."
        ) from error
    return coding.decode(point)


def count_startup_trials(sampler: ModelBasedSampler, *, trials: int) -> int:
    """Returns how many of an arm's trials are Sobol points before the sampler learns.

    `sampler.startup_trials`, or, where it is null, half of the arm's trials, rounded up, because so many may start
    before the first result; of a long arm `MAX_STARTUP_TRIALS`.
    """
    if sampler.startup_trials is not None:
        return sampler.startup_trials
    return min(math.ceil(trials / 2), MAX_STARTUP_TRIALS)


def proposal_seed(seed: int, arm: str, number: int | None) -> int:
    """Returns Optuna's seed for one trial, or with None for the whole arm; it is the same in every process."""
    return zlib.crc32(f"{seed}/{arm}/{'' if number is None else number}".encode())


class Coding:
    """Turns an arm's parameters into points and back. Keys are sorted: their order in the file changes nothing."""

    def __init__(self, space: Space) -> None:
        self.space: Space = {key: space[key] for key in sorted(space)}
        self.choices: dict[str, list[Any]] = {}
        """Per key with a list of choices, the choices by position."""
        self.ranges: Space = {}
        """What Optuna sees: per key with more than one value, the range of a point's value."""
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


class _SobolSequence:
    """The scrambled Sobol points of one arm (Optuna's QMC sampler), in which every choice is equally frequent.

    Of k successive points, each of k choices has exactly one: they are assigned in the order of the points'
    coordinates. A cut of the coordinate into k equal parts would not do that, because Sobol points are even over 2^n
    parts: with 6 ranks a rank is missing in the first 6 points of 81 % of the sequences, and in the first 12 of 6 %.
    """

    def __init__(self, ranges: Space, choices: frozenset[str], seed: int) -> None:
        self._num_choices = {key: _count_positions(ranges[key]) for key in ranges if key in choices}
        self._drawn: Space = {
            key: FloatDistribution(0.0, 1.0) if key in self._num_choices else range_ for key, range_ in ranges.items()
        }
        sampler = QMCSampler(qmc_type="sobol", scramble=True, seed=seed, warn_independent_sampling=False)
        self._study = optuna.create_study(sampler=sampler)
        # QMC reads its space from the first finished trial, and without one draws independently at random
        known: Point = {}
        for key, range_ in self._drawn.items():
            if isinstance(range_, FloatDistribution | IntDistribution):
                known[key] = range_.low
        self._study.add_trial(create_trial(value=0.0, params=known, distributions=self._drawn))
        self._coordinates: list[Point] = []

    def point(self, index: int) -> Point:
        """Returns the point at an index, from 0."""
        point = dict(self._coordinate(index))
        for key, count in self._num_choices.items():
            first = index - index % count
            block = [self._coordinate(member)[key] for member in range(first, first + count)]
            point[key] = sorted(range(count), key=block.__getitem__).index(index - first)
        return point

    def _coordinate(self, index: int) -> Point:
        while len(self._coordinates) <= index:
            self._coordinates.append(self._study.ask(self._drawn).params)
        return self._coordinates[index]


def _count_positions(range_: BaseDistribution) -> int:
    if isinstance(range_, IntDistribution):
        return range_.high + 1
    assert isinstance(range_, CategoricalDistribution)
    return len(range_.choices)


@lru_cache(maxsize=MAX_CACHED_ARMS)
def _sobol_sequence(
    ranges: tuple[tuple[str, BaseDistribution], ...], choices: frozenset[str], seed: int
) -> _SobolSequence:
    return _SobolSequence(dict(ranges), choices, seed)


class _TriedPoints:
    """The points of earlier trials; `point in tried` says whether a point repeats one."""

    def __init__(self, ranges: Space, points: Iterable[Point]) -> None:
        self._continuous = [
            key for key, range_ in ranges.items() if isinstance(range_, FloatDistribution) and range_.step is None
        ]
        self._discrete = [key for key in ranges if key not in self._continuous]
        self._tried: defaultdict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
        """Continuous values of all points with the same discrete ones."""
        for point in points:
            self._tried[self._discrete_values(point)].append([point[key] for key in self._continuous])

    def __contains__(self, point: Point) -> bool:
        values = [point[key] for key in self._continuous]
        return any(
            all(abs(a - b) <= MAX_REPEAT_FRACTION * max(abs(a), abs(b)) for a, b in zip(values, other, strict=True))
            for other in self._tried.get(self._discrete_values(point), ())
        )

    def _discrete_values(self, point: Point) -> tuple[Any, ...]:
        return tuple(point[key] for key in self._discrete)


def _is_infeasible(trial: FrozenTrial) -> bool:
    return any(excess > 0 for excess in trial.constraints.values())


def _is_result(trial: FrozenTrial) -> bool:
    """Whether something is known of a trial: a value, a partial one, or that it does not fit in memory."""
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
        return _is_infeasible(trial) or _last_value(trial) is not None
    return False


def _last_value(trial: FrozenTrial) -> float | None:
    """Returns a trial's value, or its last intermediate one; None where there is none that is finite."""
    if _is_infeasible(trial):
        return None
    value = trial.value
    if value is None and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return value if value is not None and math.isfinite(value) else None


def select_results(
    results: list[tuple[FrozenTrial, Point]], *, direction: Direction
) -> list[tuple[FrozenTrial, Point]]:
    """Returns at most `MAX_HISTORY_TRIALS` results in their order: the best half, and the latest of the others."""
    if len(results) <= MAX_HISTORY_TRIALS:
        return results
    by_rank = sorted(range(len(results)), key=lambda index: _rank(results[index][0], direction=direction))
    best, others = by_rank[: MAX_HISTORY_TRIALS // 2], by_rank[MAX_HISTORY_TRIALS // 2 :]
    latest = sorted(others)[len(best) - MAX_HISTORY_TRIALS :]
    return [results[index] for index in sorted([*best, *latest])]


def _rank(trial: FrozenTrial, *, direction: Direction) -> tuple[int, int, float]:
    """Returns the sort key of a result, best first: complete ones, then partial ones by how far they came (as TPE)."""
    value = _last_value(trial)
    if value is None:
        return 2, 0, 0.0
    cost = value if direction == "minimize" else -value
    return (0, 0, cost) if trial.state == TrialState.COMPLETE else (1, -max(trial.intermediate_values), cost)


def _show_to_tpe(results: list[tuple[FrozenTrial, Point]], ranges: Space, *, direction: Direction) -> list[FrozenTrial]:
    """Returns results as TPE takes them: it sorts partial ones behind complete ones, and infeasible ones last."""
    return [
        create_trial(
            state=TrialState.COMPLETE if trial.state == TrialState.COMPLETE else TrialState.PRUNED,
            value=trial.value,
            params=point,
            distributions=ranges,
            intermediate_values=trial.intermediate_values,
            constraints=trial.constraints,
        )
        for trial, point in results
    ]


def _show_to_gp(results: list[tuple[FrozenTrial, Point]], ranges: Space, *, direction: Direction) -> list[FrozenTrial]:
    """Returns results as a Gaussian process takes them: each with one value.

    A partial result has its last value plus the median progress of the complete trials since that step. Values worse
    than the median become the median: a trial that diverges is far worse than all others, and a model that has to fit
    such a value is less exact near the best ones (docs/benchmarks.md, Proposals). A result without a finite value gets
    the median too. A trial that does not fit in memory also violates a constraint.
    """
    complete = [trial for trial, _ in results if trial.state == TrialState.COMPLETE]
    values: list[float | None] = []
    for trial, _ in results:
        value = _last_value(trial)
        if value is not None and trial.state != TrialState.COMPLETE:
            step = max(trial.intermediate_values)
            progress = [
                end - peer.intermediate_values[step]
                for peer in complete
                if step in peer.intermediate_values and (end := _last_value(peer)) is not None
            ]
            value += statistics.median(progress) if progress else 0.0
        values.append(value)
    median = statistics.median(value for value in values if value is not None)
    better = min if direction == "minimize" else max
    # Optuna's sampler requires the same constraints in every trial; a trial is feasible at or below 0
    names = sorted({name for trial, _ in results for name in trial.constraints})
    return [
        create_trial(
            value=median if value is None else better(value, median),
            params=point,
            distributions=ranges,
            constraints={name: trial.constraints.get(name, -1.0) for name in names},
        )
        for value, (trial, point) in zip(values, results, strict=True)
    ]


def _build_model(sampler: ModelBasedSampler, *, seed: int) -> BaseSampler:
    """Returns Optuna's sampler, which learns from the first result on: Sobol points were drawn before."""
    if sampler.name == "gp":
        return GPSampler(n_startup_trials=1, seed=seed, warn_independent_sampling=False)
    return TPESampler(n_startup_trials=1, seed=seed)


def _ask(sampler: BaseSampler, ranges: Space, seen: Sequence[FrozenTrial], *, direction: Direction) -> Point:
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.add_trials(seen)
    return study.ask(ranges).params


def _propose_combination(coding: Coding, tried: _TriedPoints, *, seed: int, arm: str) -> dict[str, Any]:
    """Returns the first combination of the grid, in a random order that the seed decides, that no trial has."""
    axes = tuple(
        (key, tuple(range(len(coding.choices[key]))) if key in coding.choices else tuple(grid_values(key, range_)))
        for key, range_ in coding.ranges.items()
    )
    for combination in _shuffle_grid(axes, seed):
        point = dict(zip(coding.ranges, combination, strict=True))
        if point not in tried:
            return coding.decode(point)
    raise RunError(
        f"`sampler=grid` must have a combination that arm {arm!r} did not try, but each of them was tried. "
        "Use `sampler=qmc`."
    )


@lru_cache(maxsize=MAX_CACHED_ARMS)
def _shuffle_grid(axes: tuple[tuple[str, tuple[Any, ...]], ...], seed: int) -> list[tuple[Any, ...]]:
    combinations = list(itertools.product(*(values for _, values in axes)))
    random.Random(seed).shuffle(combinations)
    return combinations
