"""The parameters of an arm's next trial: Sobol points first, then points that TPE or a Gaussian process chooses.

A proposal depends on the sweep's seed, the arm's name, the trial's number and the arm's history alone. It is made on a
fresh in-memory study, so nothing is written and no sampler carries a state from one trial to the next. The rules:

1. Trials below `count_startup_trials`, and all trials before `MIN_RESULTS` results, are scrambled Sobol points.
2. A model sees at most `MAX_HISTORY_TRIALS` results, the best half and the latest of the others, and every running
   trial.
3. A proposal that repeats an earlier trial of the arm is replaced by the first of the next `MAX_SOBOL_DRAWS` Sobol
   points that repeats none. If each of them does, as in a small space without further points, the proposal stays.

A sampler that is set by `_target_` follows none of these rules: it is asked from the first trial on.
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
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.components import Component
from lorasweep.config.data import Direction
from lorasweep.config.sweep import ModelBasedSampler
from lorasweep.errors import ConfigError, RunError, first_line
from lorasweep.sweep.controller.component_sampler import ask_sampler
from lorasweep.sweep.controller.encoding import Point
from lorasweep.sweep.controller.history import History, Result, last_value
from lorasweep.sweep.controller.sobol import SobolSequence
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.space import Space, grid_values

MAX_STARTUP_TRIALS = 32
"""Number of Sobol points at the start of an arm of 64 trials or more."""
MIN_RESULTS = 2
"""Number of results before a model is asked: a single result is neither better nor worse."""
MAX_SOBOL_DRAWS = 20
"""Number of Sobol points that are tried in place of a proposal that repeats an earlier trial."""
MAX_CACHED_GRIDS = 64
"""Number of grids whose order is kept in memory."""
SAMPLER_ATTRIBUTE = "lorasweep:sampler"
"""Name of the user attribute with the state that a sampler set by `_target_` keeps with a trial that it proposed."""


def propose(
    arm: Arm, history: History | Sequence[FrozenTrial], *, number: int, direction: Direction
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters of an arm's next trial, and further user attributes which that trial must get.

    Args:
        arm: The arm, with its sampler and the sweep's seed.
        history: The arm's earlier trials, or a list of them in their order.
        number: The position of the new trial among the arm's trials, from 0.
        direction: Which scores are better.

    Raises:
        ConfigError: The sampler can't be built, or can't propose a trial for this space.
        RunError: Each combination of the grid was tried.
    """
    if not isinstance(history, History):
        history = History(arm.space, history, direction=direction)
    sampler, seed, encoding = arm.sweep_config.sampler, _derive_seed(arm, number), history.encoding
    if not encoding.ranges:
        return encoding.decode({}), {}
    attributes: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if isinstance(sampler, Component):
                point, attributes = ask_sampler(
                    sampler, history.all(), encoding.ranges, kept_as=SAMPLER_ATTRIBUTE, seed=seed, direction=direction
                )
            elif sampler.name == "grid":
                point = _next_combination(arm, history)
            else:
                sobol = SobolSequence(encoding.ranges, choices=frozenset(encoding.choices), seed=_derive_seed(arm))
                if sampler.name == "random":
                    point = _ask(RandomSampler(seed=seed), encoding.ranges, [], direction=direction)
                elif isinstance(sampler, ModelBasedSampler) and _may_learn(sampler, history, number, arm=arm):
                    point = _ask_model(sampler, history, seed=seed)
                else:
                    point = sobol.point(number)
                draws = itertools.chain([point], (sobol.point(number + ahead) for ahead in range(MAX_SOBOL_DRAWS)))
                point = next((draw for draw in draws if draw not in history.tried), point)
    except (ConfigError, RunError):
        raise
    except Exception as error:  # whatever a sampler raises: the user needs the sampler's name and another one to use
        raise ConfigError(
            f"`sampler` must be able to propose a trial for the space of arm {arm.name!r}, but {sampler.name!r} raised "
            f"{type(error).__name__}: {first_line(error)}. Use `sampler=qmc`."
        ) from error
    return encoding.decode(point), attributes


def count_startup_trials(sampler: ModelBasedSampler, *, trials: int) -> int:
    """Returns how many of an arm's trials are Sobol points before the sampler learns.

    This is `sampler.startup_trials`. If that is null, it is half of the arm's trials, rounded up, because so many may
    start before the first result, but at most `MAX_STARTUP_TRIALS`.
    """
    if sampler.startup_trials is not None:
        return sampler.startup_trials
    return min(math.ceil(trials / 2), MAX_STARTUP_TRIALS)


def _derive_seed(arm: Arm, number: int | None = None) -> int:
    """Returns the seed of one trial, or of the whole arm; it is the same in every process."""
    return zlib.crc32(f"{arm.sweep_config.sweep.seed}/{arm.name}/{'' if number is None else number}".encode())


def _may_learn(sampler: ModelBasedSampler, history: History, number: int, *, arm: Arm) -> bool:
    return number >= count_startup_trials(sampler, trials=arm.trials) and history.num_values >= MIN_RESULTS


def _next_combination(arm: Arm, history: History) -> Point:
    """Returns the first combination of the grid that no trial has, in a random order that the arm's seed decides."""
    encoding = history.encoding
    axes = tuple(
        tuple(range(len(encoding.choices[key])) if key in encoding.choices else grid_values(key, range_))
        for key, range_ in encoding.ranges.items()
    )
    for combination in _shuffle_grid(axes, _derive_seed(arm)):
        point = dict(zip(encoding.ranges, combination, strict=True))
        if point not in history.tried:
            return point
    raise RunError(
        f"`sampler=grid` must have a combination that arm {arm.name!r} did not try, but each of them was tried. "
        "Use `sampler=qmc`."
    )


@lru_cache(maxsize=MAX_CACHED_GRIDS)
def _shuffle_grid(axes: tuple[tuple[Any, ...], ...], seed: int) -> list[tuple[Any, ...]]:
    combinations = list(itertools.product(*axes))
    random.Random(seed).shuffle(combinations)
    return combinations


def _ask_model(sampler: ModelBasedSampler, history: History, *, seed: int) -> Point:
    """Returns the point that TPE or a Gaussian process chooses from the arm's results and running trials."""
    ranges, direction = history.encoding.ranges, history.direction
    shown = (_show_to_gp if sampler.name == "gp" else _show_to_tpe)(history.results(), ranges, direction=direction)
    shown += [_show(point, ranges, state=TrialState.RUNNING) for point in history.running()]
    # The models learn from the first result on: the points before it are Sobol points, not Optuna's random ones.
    if sampler.name == "gp":
        model: BaseSampler = GPSampler(n_startup_trials=1, seed=seed, warn_independent_sampling=False)
    else:
        model = TPESampler(n_startup_trials=1, seed=seed)
    return _ask(model, ranges, shown, direction=direction)


def _ask(sampler: BaseSampler, ranges: Space, shown: Sequence[FrozenTrial], *, direction: Direction) -> Point:
    study = optuna.create_study(sampler=sampler, direction=direction, storage=_ShownTrials(shown))
    return study.ask(ranges).params


class _ShownTrials(InMemoryStorage):
    """The storage of a study that a sampler is asked on: the trials that it sees, and the one that it proposes.

    Optuna would copy each trial on its way into a study, which takes longer than a proposal.
    """

    def __init__(self, shown: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._shown = shown
        for number, trial in enumerate(shown, start=1):  # the new trial is number 0
            trial.number = number

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,  # noqa: FBT001, FBT002 (Optuna's)
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Returns the trials that are shown, then the new one. Called by Optuna."""
        shown = [trial for trial in self._shown if states is None or trial.state in states]
        return [*(copy.deepcopy(shown) if deepcopy else shown), *super().get_all_trials(study_id, deepcopy, states)]


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


def _show_to_tpe(results: Sequence[Result], ranges: Space, *, direction: Direction) -> list[FrozenTrial]:
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


def _show_to_gp(results: Sequence[Result], ranges: Space, *, direction: Direction) -> list[FrozenTrial]:
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
                end - start
                for peer in complete
                if math.isfinite(start := peer.intermediate_values.get(step, math.nan))
                and (end := last_value(peer)) is not None
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
