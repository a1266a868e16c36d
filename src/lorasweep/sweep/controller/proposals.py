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

import copy
import itertools
import math
import random
import statistics
import warnings
import zlib
from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from lorasweep.config.data import Direction
from lorasweep.config.sweep import FixedSampler, ModelBasedSampler
from lorasweep.errors import ConfigError, RunError, first_line
from lorasweep.sweep.controller.history import Coding, History, Point, TriedPoints, last_value
from lorasweep.sweep.definition.space import Space, grid_values

MAX_STARTUP_TRIALS = 32
"""Sobol points at the start of an arm of 64 trials or more."""
MIN_RESULTS = 2
"""Results before a model is asked: a single result is neither better nor worse."""
MAX_SOBOL_DRAWS = 20
"""Sobol points that are tried in place of a proposal that repeats an earlier trial."""
NUM_SOBOL_DRAWN = 256
"""Sobol points that are drawn at once; their number must be a power of 2."""
MAX_SOBOL_CHUNKS = 4
"""How often so many points of an arm are kept: a trial looks at the 20 after its own, and at those of their choices."""
MAX_CACHED_ARMS = 256
"""Arms whose Sobol sequence or order of grid points is kept in memory."""


def propose(
    history: History,
    *,
    sampler: ModelBasedSampler | FixedSampler,
    trials: int,
    number: int,
    seed: int,
    arm: str,
) -> dict[str, Any]:
    """Returns the parameters of trial `number` of an arm, from the seed and the history alone.

    Args:
        history: The arm's earlier trials.
        sampler: How points are chosen.
        trials: Number of trials that the arm gets in all.
        number: Position of the new trial among the arm's trials, from 0.
        seed: The sweep's seed.
        arm: The arm's name.

    Raises:
        ConfigError: The sampler can't be built, can't propose for this space, or the space is continuous under `grid`.
        RunError: The grid has no combination that was not tried.
    """
    coding, tried, direction = history.coding, history.tried, history.direction
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
            if sampler.name == "random":
                point = _ask(RandomSampler(seed=each_seed), coding.ranges, [], direction=direction)
            elif (
                not isinstance(sampler, ModelBasedSampler)
                or number < count_startup_trials(sampler, trials=trials)
                or history.num_values < MIN_RESULTS
            ):
                point = sobol.point(number)
            else:
                show = _show_to_tpe if sampler.name == "tpe" else _show_to_gp
                seen = show(history.results(), coding.ranges, direction=direction)
                seen += [_show(point, coding.ranges, state=TrialState.RUNNING) for point in history.running()]
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


class _SobolSequence:
    """The scrambled Sobol points of one arm, in which every choice is equally frequent.

    They are those of Optuna's QMC sampler, which would build the sequence anew for each point.

    Of k successive points, each of k choices has exactly one: they are assigned in the order of the points'
    coordinates. A cut of the coordinate into k equal parts would not do that, because Sobol points are even over 2^n
    parts: with 6 ranks a rank is missing in the first 6 points of 81 % of the sequences, and in the first 12 of 6 %.
    """

    def __init__(self, ranges: Space, choices: frozenset[str], seed: int) -> None:
        self._num_choices = {key: _count_positions(ranges[key]) for key in ranges if key in choices}
        self._drawn: Space = {
            key: FloatDistribution(0.0, 1.0) if key in self._num_choices else range_ for key, range_ in ranges.items()
        }
        self._seed = seed
        self._drawn_points: dict[int, list[Point]] = {}
        """The last ones that were drawn, by their index over `NUM_SOBOL_DRAWN`."""

    def point(self, index: int) -> Point:
        """Returns the point at an index, from 0."""
        point = dict(self._coordinate(index))
        for key, count in self._num_choices.items():
            first = index - index % count
            block = [self._coordinate(member)[key] for member in range(first, first + count)]
            point[key] = sorted(range(count), key=block.__getitem__).index(index - first)
        return point

    def _coordinate(self, index: int) -> Point:
        chunk, place = divmod(index, NUM_SOBOL_DRAWN)
        if chunk not in self._drawn_points:
            self._drawn_points = dict(list(self._drawn_points.items())[1 - MAX_SOBOL_CHUNKS :])
            self._drawn_points[chunk] = self._draw(chunk)
        return self._drawn_points[chunk][place]

    def _draw(self, chunk: int) -> list[Point]:
        engine = qmc.Sobol(len(self._drawn), scramble=True, seed=self._seed)
        if chunk:
            engine.fast_forward(chunk * NUM_SOBOL_DRAWN)
        return [
            {key: _scale_to(range_, float(at)) for (key, range_), at in zip(self._drawn.items(), row, strict=True)}
            for row in engine.random(NUM_SOBOL_DRAWN)
        ]


def _scale_to(range_: BaseDistribution, fraction: float) -> float:
    """Returns the value of a range at a fraction of its length, as Optuna's QMC sampler does."""
    assert isinstance(range_, FloatDistribution | IntDistribution)
    step = range_.step or 0
    low, high = range_.low - 0.5 * step, range_.high + 0.5 * step
    if range_.log:
        low, high = math.log(low), math.log(high)
    value = low + fraction * (high - low)
    value = math.exp(value) if range_.log else value
    if isinstance(range_, IntDistribution):
        nearest = round(value) if range_.log else math.floor((value - range_.low) / step + 0.5) * step + range_.low
        return min(max(nearest, range_.low), range_.high)
    if step:
        nearest = round((value - range_.low) / step) * step + range_.low
        return min(max(nearest, range_.low), range_.high)
    return min(max(value, range_.low), math.nextafter(range_.high, range_.high - 1))


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


def _show_to_tpe(results: list[tuple[FrozenTrial, Point]], ranges: Space, *, direction: Direction) -> list[FrozenTrial]:
    """Returns results as TPE takes them: it sorts partial ones behind complete ones, and infeasible ones last."""
    return [
        _show(
            point,
            ranges,
            state=TrialState.COMPLETE if trial.state == TrialState.COMPLETE else TrialState.PRUNED,
            value=trial.value,
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
        value = last_value(trial)
        if value is not None and trial.state != TrialState.COMPLETE:
            step = max(trial.intermediate_values)
            progress = [
                end - peer.intermediate_values[step]
                for peer in complete
                if step in peer.intermediate_values and (end := last_value(peer)) is not None
            ]
            value += statistics.median(progress) if progress else 0.0
        values.append(value)
    median = statistics.median(value for value in values if value is not None)
    better = min if direction == "minimize" else max
    # Optuna's sampler requires the same constraints in every trial; a trial is feasible at or below 0
    names = sorted({name for trial, _ in results for name in trial.constraints})
    return [
        _show(
            point,
            ranges,
            state=TrialState.COMPLETE,
            value=median if value is None else better(value, median),
            constraints={name: trial.constraints.get(name, -1.0) for name in names},
        )
        for value, (trial, point) in zip(values, results, strict=True)
    ]


def _build_model(sampler: ModelBasedSampler, *, seed: int) -> BaseSampler:
    """Returns Optuna's sampler, which learns from the first result on: Sobol points were drawn before."""
    if sampler.name == "gp":
        return GPSampler(n_startup_trials=1, seed=seed, warn_independent_sampling=False)
    return TPESampler(n_startup_trials=1, seed=seed)


class _SeenTrials(InMemoryStorage):
    """The storage of a study that a sampler is asked on: the trials that it sees, and the one that it proposes.

    Optuna would copy each trial on its way into a study, which takes longer than a proposal.
    """

    def __init__(self, seen: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._seen = seen
        for number, trial in enumerate(seen, start=1):  # the new trial is number 0
            trial.number = number

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,  # noqa: FBT001, FBT002 (Optuna's)
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Returns the trials that are seen, then the new one. Called by Optuna."""
        seen = [trial for trial in self._seen if states is None or trial.state in states]
        return [*(copy.deepcopy(seen) if deepcopy else seen), *super().get_all_trials(study_id, deepcopy, states)]


def _ask(sampler: BaseSampler, ranges: Space, seen: Sequence[FrozenTrial], *, direction: Direction) -> Point:
    study = optuna.create_study(sampler=sampler, direction=direction, storage=_SeenTrials(seen))
    return study.ask(ranges).params


def _show(
    point: Point,
    ranges: Space,
    *,
    state: TrialState,
    value: float | None = None,
    intermediate_values: Mapping[int, float] = MappingProxyType({}),
    constraints: Mapping[str, float] = MappingProxyType({}),
) -> FrozenTrial:
    """Returns a trial as a sampler sees it. Unlike `create_trial` it does not check again what was checked before."""
    trial = FrozenTrial(
        number=0,
        trial_id=0,
        state=state,
        value=value,
        params=point,
        distributions=ranges,
        intermediate_values=dict(intermediate_values),
        user_attrs={},
        system_attrs={},
        datetime_start=None,
        datetime_complete=None,
    )
    for name, excess in constraints.items():
        trial.set_constraint(name, excess)
    return trial


def _propose_combination(coding: Coding, tried: TriedPoints, *, seed: int, arm: str) -> dict[str, Any]:
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
