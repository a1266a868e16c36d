"""Proposes the parameters of an arm's next trial.

A proposal depends only on the sweep's seed, the arm's name, the trial's number and the arm's history. Optuna's samplers
are asked on a new study in memory, so nothing is written, and a sampler keeps no state between trials:

- `qmc`: every trial is a scrambled Sobol point.
- `tpe` and `gp`: the first half of the arm's trials, and all trials before `MIN_RESULTS` results, are scrambled Sobol
  points. A model proposes the other trials. It sees every running trial, and at most `MAX_HISTORY_TRIALS` results, the
  best ones.
- `gp` in an arm with `confirm_each`, or that searches the learning rate alone: the Gaussian process of `predictions`
  proposes, for each value in turn.
- `random`, `grid` and `_target_`: the sampler, of Optuna or of the user, proposes every trial. What it stores beside
  the parameters, such as the generation of a genetic algorithm, is kept with the trial for the next sampler.

With `qmc`, `tpe` and `gp`, a proposal that repeats an earlier trial of the arm is replaced by the first of the next
`MAX_SOBOL_DRAWS` Sobol points that repeats no trial. In a small space all may repeat one; then the proposal stays.
"""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.build import TARGET
from lorasweep.config.components import Component, instantiate, list_argument_names
from lorasweep.config.sweep import NamedSampler
from lorasweep.errors import ConfigError, first_line
from lorasweep.record import Trial
from lorasweep.sweep.controller.encoding import History, Point, draw_sobol_point, get_score
from lorasweep.sweep.controller.predictions import has_own_model, propose_by_model
from lorasweep.sweep.definition.arms import Arm

MIN_RESULTS = 2
"""Minimum number of results before a model is asked. A model needs two results to compare."""
MAX_SOBOL_DRAWS = 20
"""Maximum number of Sobol points that are tried to replace a proposal that repeats an earlier trial."""


def propose(arm: Arm, history: History, *, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters of an arm's trial of this number, and what its sampler stores (`Trial.sampler_state`).

    Raises ConfigError if the sampler can't be built, or can't propose a trial for this space.
    """
    sampler, encoding = arm.sweep_config.sampler, history.encoding
    if not encoding.ranges:
        return encoding.decode({}), {}
    seed, arm_seed = (zlib.crc32(f"{arm.sweep_config.sweep.seed}/{arm.name}/{of}".encode()) for of in (number, ""))
    state: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if isinstance(sampler, Component):
                seeded = _add_seeds({TARGET: sampler.target, **sampler.arguments}, seed=seed, key="sampler")
                del seeded[TARGET]
                expected: type[BaseSampler] = BaseSampler  # type: ignore[type-abstract]
                built = instantiate(replace(sampler, arguments=seeded), key="sampler", expected=expected)
                point, state = _ask(built, history, [history.build_frozen_trial(trial) for trial in history.trials])
            else:
                points = (draw_sobol_point(encoding, number + n, seed=arm_seed) for n in range(MAX_SOBOL_DRAWS))
                if (
                    find_batch_start(arm, number) == 0
                    or sum(get_score(trial) is not None for trial in history.list_results()) < MIN_RESULTS
                ):
                    point = next(points)
                elif sampler.name == "gp" and has_own_model(arm):
                    point = propose_by_model(arm, history, seed=arm_seed)
                else:
                    point = _ask_model(sampler, history, seed=seed)
                draws = itertools.chain([point], points)
                point = next((draw for draw in draws if not history.has_tried(draw)), point)
    except ConfigError:
        raise
    except Exception as error:  # a sampler may raise anything
        raise ConfigError(
            f"`sampler` must be able to propose a trial for the space of arm {arm.name!r}, but {sampler.name!r} raised "
            f"{type(error).__name__}: {first_line(error)}. Use `sampler=qmc`."
        ) from error
    return encoding.decode(point), state


def _add_seeds(value: Any, *, seed: int, key: str) -> Any:
    """Returns a component's settings with a seed for each class in them that takes a seed."""
    if isinstance(value, list | tuple):
        return [_add_seeds(item, seed=seed, key=f"{key}.{position}") for position, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    seeded = {name: _add_seeds(item, seed=seed, key=f"{key}.{name}") for name, item in value.items()}
    if TARGET in value and "seed" in list_argument_names(value[TARGET], key=key)[0]:
        seeded["seed"] = seed
    return seeded


def find_batch_start(arm: Arm, number: int) -> int:
    """Returns the number of the first trial in the batch of a trial.

    The second half of an arm's trials begins when the first half has ended, and its proposals see the results of the
    first half alone. So they depend neither on the number of workers nor on which worker was first. Smaller batches
    found no better settings in replays, and leave slots of packs empty. Sobol points do not depend on results, so an
    arm of `qmc` is one batch.
    """
    first = math.ceil(arm.trials / 2)
    return 0 if arm.sweep_config.sampler.name == "qmc" or number < first else first


def _ask_model(sampler: NamedSampler, history: History, *, seed: int) -> Point:
    """Returns the point that TPE or a Gaussian process chooses from the arm's results and running trials.

    A Gaussian process reads results as complete trials with a value. Values that are worse than the median or missing
    become the median. A trial that learned nothing would be far worse than all others, and a model that fits such a
    value is less exact near the best trials.
    """
    # `n_startup_trials=1` turns off Optuna's random startup trials, because Sobol points take their place.
    model: BaseSampler = TPESampler(n_startup_trials=1, seed=seed)
    results: list[Trial] = history.list_results()
    shown = [history.build_frozen_trial(trial) for trial in results]
    if sampler.name == "gp":
        model = GPSampler(n_startup_trials=1, seed=seed, warn_independent_sampling=False)
        better = min if history.metric.sign == 1 else max
        scores = [get_score(trial) for trial in results]
        median = statistics.median(score for score in scores if score is not None)
        values = [median if score is None else better(score, median) for score in scores]
        shown = [
            history.build_frozen_trial(trial, state=TrialState.COMPLETE, value=value)
            for trial, value in zip(results, values, strict=True)
        ]
        # Optuna's sampler requires the same constraints in every trial; a trial is feasible at or below 0
        names = {name for trial in shown for name in trial.constraints}
        for trial in shown:
            for name in names - trial.constraints.keys():
                trial.set_constraint(name, -1.0)
    point, _ = _ask(model, history, [*shown, *map(history.build_frozen_trial, history.list_running())])
    return history.encoding.encode(history.encoding.decode(point))  # limits u to the range of the learning rate


def _ask(sampler: BaseSampler, history: History, shown: Sequence[FrozenTrial]) -> tuple[Point, dict[str, Any]]:
    """Returns the point of the next trial, and what the sampler stores with it."""
    storage = InMemoryStorage()
    study = optuna.create_study(sampler=sampler, direction=history.metric.direction, storage=storage)
    study_id = storage.get_study_id_from_name(study.study_name)
    study.add_trials(shown)
    known: dict[str, Any] = {}  # attributes that earlier samplers wrote to the study
    for trial in history.trials:
        known |= trial.sampler_state.get("study", {})
    for name, value in known.items():
        storage.set_study_system_attr(study_id, name, value)
    params = study.ask(history.encoding.distributions).params
    study_attributes = storage.get_study_system_attrs(study_id)
    state = {
        "trial": study.get_trials(deepcopy=False)[-1].system_attrs,
        "study": {name: value for name, value in study_attributes.items() if known.get(name) != value},
    }
    return params, state if any(state.values()) else {}
