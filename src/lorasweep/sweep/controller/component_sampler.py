"""Samplers that settings name by `_target_`: from Optuna, or from the user's code.

Each trial is proposed by a new sampler with its own seed. If a sampler stores anything beside the parameters, such as
the generation of a genetic algorithm, the journal keeps it with the trial, and the next sampler gets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import create_trial

from lorasweep.config.build import TARGET
from lorasweep.config.components import Component, argument_names, instantiate
from lorasweep.sweep.controller.encoding import Point
from lorasweep.sweep.controller.history import History


def ask_sampler(component: Component, history: History, *, seed: int) -> tuple[Point, dict[str, Any]]:
    """Returns the point of the next trial, and what the sampler stores with it.

    Raises:
        ConfigError: The sampler can't be built.
    """
    sampler, ranges = build_sampler(component, seed=seed), history.encoding.ranges
    storage = InMemoryStorage()
    study = optuna.create_study(sampler=sampler, direction=history.direction, storage=storage)
    study_id = storage.get_study_id_from_name(study.study_name)
    known: dict[str, Any] = {}  # attributes that earlier samplers wrote to the study
    for trial in history.trials:
        known |= trial.sampler_state.get("study", {})
        shown = history.show(trial)
        study.add_trial(
            create_trial(
                state=shown.state,
                value=shown.value,
                params=shown.params,
                distributions=ranges,
                intermediate_values=shown.intermediate_values,
                constraints=shown.constraints,
                system_attrs=dict(trial.sampler_state.get("trial", {})),  # Optuna adds the constraints to it
            )
        )
    for name, value in known.items():
        storage.set_study_system_attr(study_id, name, value)
    params = study.ask(ranges).params
    study_attributes = storage.get_study_system_attrs(study_id)
    state = {
        "trial": study.get_trials(deepcopy=False)[-1].system_attrs,
        "study": {name: value for name, value in study_attributes.items() if known.get(name) != value},
    }
    return params, state if any(state.values()) else {}


def build_sampler(component: Component, *, seed: int) -> BaseSampler:
    """Returns the sampler that a component names. It and samplers in its arguments get the seed, if they take a seed.

    Raises:
        ConfigError: The class is missing or not a sampler, or does not take these arguments.
    """
    seeded: dict[str, Any] = _add_seeds({TARGET: component.target, **component.arguments}, seed=seed, key="sampler")
    del seeded[TARGET]
    expected: type[BaseSampler] = BaseSampler  # type: ignore[type-abstract]
    return instantiate(Component(target=component.target, arguments=seeded), key="sampler", expected=expected)


def _add_seeds(value: Any, *, seed: int, key: str) -> Any:
    """Returns a component's settings with a seed for each class in them that takes a seed."""
    if isinstance(value, list | tuple):
        return [_add_seeds(item, seed=seed, key=f"{key}.{position}") for position, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    seeded = {name: _add_seeds(item, seed=seed, key=f"{key}.{name}") for name, item in value.items()}
    if TARGET in value and "seed" in argument_names(value[TARGET], key=key)[0]:
        seeded["seed"] = seed
    return seeded
