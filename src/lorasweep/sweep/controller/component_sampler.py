"""Samplers that settings name by `_target_`: from Optuna, from OptunaHub, or from the user's code.

Each trial is proposed by a new sampler with its own seed. If a sampler stores anything beside the parameters, such as
the generation of a genetic algorithm, the journal keeps it with the trial, and the next sampler gets it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import create_trial

from lorasweep.config.build import TARGET
from lorasweep.config.components import Component, argument_names, instantiate, require_package
from lorasweep.errors import ConfigError
from lorasweep.sweep.controller.encoding import Point
from lorasweep.sweep.controller.history import History
from lorasweep.wording import nearest

OPTUNA_HUB = "optunahub"


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


class OptunaHubSampler(BaseSampler):
    """A sampler from OptunaHub (https://hub.optuna.org). Creating one downloads code and runs it."""

    def __new__(  # type: ignore[misc]  # it returns the sampler of the package itself
        cls, package: str, sampler: str, *, ref: str = "main", seed: int | None = None, **arguments: Any
    ) -> BaseSampler:
        """Returns a sampler of a package, which is downloaded unless it is in OptunaHub's cache.

        Args:
            package: The package in the registry, such as `samplers/auto_sampler`.
            sampler: The class in the package, such as `AutoSampler`.
            ref: Branch, tag or commit of the registry. Give a commit if the sweep is to be repeated later.
            seed: Handed to the class, if it takes a seed.
            arguments: Further arguments of the class.

        Raises:
            ConfigError: OptunaHub is not installed, or the package has no such sampler.
        """
        require_package(OPTUNA_HUB, key="sampler")
        module = import_module(OPTUNA_HUB).load_module(package, ref=ref)
        sampler_class = getattr(module, sampler, None)
        if not (isinstance(sampler_class, type) and issubclass(sampler_class, BaseSampler)):
            near = nearest(sampler, vars(module))
            raise ConfigError(f"`sampler.sampler` must be a sampler in {package!r}, but got {sampler!r}.{near}")
        if "seed" in inspect.signature(sampler_class).parameters:
            arguments = {**arguments, "seed": seed}
        return sampler_class(**arguments)
