"""The parameters of an arm's next trial from a sampler that settings name by `_target_`: one of Optuna's or another's.

As in `proposals`, a proposal depends on the sweep's seed, the arm's name, the trial's number and the arm's history
alone: the sampler is made anew for each, with a seed of its own, on a fresh in-memory study. What it writes beside the
parameters (the generation of a genetic algorithm, the position in a sequence) is kept with the trial in the journal,
and handed to it again. Nothing else is done: no Sobol points before it, and a point that it repeats is trained again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler
from optuna.storages import InMemoryStorage
from optuna.trial import create_trial

from lorasweep.config.targets import TARGET, Component, argument_names, instantiate, is_trusted
from lorasweep.errors import ConfigError, first_line
from lorasweep.sweep.controller.history import History
from lorasweep.sweep.controller.proposals import proposal_seed
from lorasweep.sweep.controller.rows import SAMPLER_ATTRIBUTE

PICKLING_PACKAGE = "cmaes"
"""Package whose objects Optuna's `CmaEsSampler` keeps as pickles in the journal. Reading one could run any code."""
PICKLE_PREFIXES = ("cma:", "sepcma:", "cmawm:")
"""Names under which it keeps them begin so."""


def ask_component(
    component: Component,
    history: History,
    *,
    number: int,
    seed: int,
    arm: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the parameters of trial `number` of an arm, and what its journal entry is to keep for the sampler.

    Arguments as in `proposals.propose`, but for `component`, which names the sampler's class.

    Raises:
        ConfigError: The sampler can't be built, or can't propose for this space.
    """
    coding = history.coding
    if not coding.ranges:
        return coding.decode({}), {}
    sampler = build_sampler(component, seed=proposal_seed(seed, arm, number))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            storage = InMemoryStorage()
            study = optuna.create_study(sampler=sampler, direction=history.direction, storage=storage)
            study_id = storage.get_study_id_from_name(study.study_name)
            known = _restore(study, history)
            for name, value in known.items():
                storage.set_study_system_attr(study_id, name, value)
            trial = study.ask(coding.ranges)
            of_study = storage.get_study_system_attrs(study_id)
            state = {
                "trial": study.get_trials(deepcopy=False)[-1].system_attrs,
                "study": {name: value for name, value in of_study.items() if known.get(name) != value},
            }
    except Exception as error:  # whatever a sampler raises
        raise ConfigError(
            f"`sampler` must be able to propose a trial for the space of arm {arm!r}, but {component.target!r} raised "
            f"{type(error).__name__}: {first_line(error)}."
        ) from error
    return coding.decode(trial.params), {SAMPLER_ATTRIBUTE: state} if any(state.values()) else {}


def build_sampler(component: Component, *, seed: int) -> BaseSampler:
    """Returns the sampler that a component names; it and the samplers inside of it get the seed, where they take one.

    Raises:
        ConfigError: The class is not trusted, not there or no sampler, or does not take these arguments.
    """
    seeded: dict[str, Any] = _with_seed({TARGET: component.target, **component.arguments}, seed=seed, key="sampler")
    del seeded[TARGET]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        expected: type[BaseSampler] = BaseSampler  # type: ignore[type-abstract]
        made = instantiate(Component(target=component.target, arguments=seeded), key="sampler", expected=expected)
    if isinstance(made, CmaEsSampler) and not is_trusted(PICKLING_PACKAGE):
        raise ConfigError(
            f"`sampler._target_` must be a sampler that keeps no pickles, but {component.target!r} does, and a "
            f"stranger's journal could run code by them. For a sweep of your own add `trust=[{PICKLING_PACKAGE}]` to "
            "the command line."
        )
    return made


def _with_seed(value: Any, *, seed: int, key: str) -> Any:
    """Returns settings of a component with a seed for each class in them that takes one."""
    if isinstance(value, list | tuple):
        return [_with_seed(item, seed=seed, key=f"{key}.{position}") for position, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    seeded = {name: _with_seed(item, seed=seed, key=f"{key}.{name}") for name, item in value.items()}
    if TARGET in value and "seed" in argument_names(value[TARGET], key=key)[0]:
        seeded["seed"] = seed
    return seeded


def _restore(study: optuna.Study, history: History) -> dict[str, Any]:
    """Puts an arm's trials into a study, with what the sampler kept of each; returns what it kept of the study."""
    of_study: dict[str, Any] = {}
    for known in history.trials():
        trial = known.trial
        kept = trial.user_attrs.get(SAMPLER_ATTRIBUTE, {})
        of_study |= _without_pickles(kept.get("study", {}))
        study.add_trial(
            create_trial(
                state=known.state,
                value=trial.value,
                params=known.point,
                distributions=history.coding.ranges,
                intermediate_values=trial.intermediate_values,
                constraints=trial.constraints,
                system_attrs=_without_pickles(kept.get("trial", {})),
            )
        )
    return of_study


def _without_pickles(state: Mapping[str, Any]) -> dict[str, Any]:
    if is_trusted(PICKLING_PACKAGE):
        return dict(state)
    return {name: value for name, value in state.items() if not name.startswith(PICKLE_PREFIXES)}
