"""The definition of a sweep: a sweep file and the command line's overrides, composed and checked for each arm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.build import as_settings, build
from lorasweep.config.compose import SWEEP_GROUPS, compose_run, compose_sweep
from lorasweep.config.data import DataConfig
from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import SweepConfig
from lorasweep.errors import ConfigError
from lorasweep.record import Subject, is_number
from lorasweep.sweep.definition.overrides import NO_OVERRIDES, ArmSettings, SweepOverrides, fold_sweep
from lorasweep.sweep.definition.ranges import Space, describe_space
from lorasweep.sweep.definition.sweep_file import (
    SweepFile,
    name_in_errors,
    read_content,
    require_folder_name,
)
from lorasweep.wording import join_words

DEFAULT_TRIALS = 16
"""Number of trials of an arm that searches several keys, if neither sweep file nor command line sets it."""
TRIAL_SETTINGS = {"trainer.progress": False}
"""Settings of every trial, because a sweep shows the progress of all its trials together."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method, or one method at one rank, with its own search space, budget and study."""

    name: str
    base: RunConfig
    """Settings of a run with every swept key at its first end."""
    space: Space
    settings: Mapping[str, Any]
    """The settings of `base` that differ from the defaults and are not swept, by dotted key."""
    corner_configs: tuple[RunConfig, ...]
    """Settings of runs at the ends of the swept ranges, from `base` to the run with every key at its last end. Between
    them, one key of `base` is at another of its ends. The choices of a list are its ends."""
    trials: int
    sweep_config: SweepConfig
    confirm_each: str | None = None
    """The swept key whose choices are confirmed one by one."""

    @cached_property
    def subjects(self) -> tuple[Subject, ...]:
        """What the confirm stage compares: the arm itself, or each value of `confirm_each`, numbers ascending."""
        key = self.confirm_each
        values = [None] if key is None else self.space[key].ends
        if all(map(is_number, values)):
            values = sorted(values)
        return tuple(Subject(arm=self.name, key=key, value=value) for value in values)

    def name_subject(self, params: Mapping[str, Any]) -> str:
        """Returns the name of the subject to which a trial with these values of the swept keys belongs."""
        key = self.confirm_each
        return Subject(arm=self.name, key=key, value=params[key] if key else None).name

    def compose(self, params: Mapping[str, Any]) -> RunConfig:
        """Returns the settings of a trial with these values of the swept keys."""
        with name_in_errors(f"arm `{self.name}`"):
            return compose_run({**self.settings, **params, **TRIAL_SETTINGS})


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A whole sweep, with its settings composed and checked for each arm."""

    name: str
    description: str
    arms: tuple[Arm, ...]
    sweep_config: SweepConfig
    raw: dict[str, Any]
    """The content of the sweep file (`file`) and the `overrides`. `restore_definition` composes the same sweep."""
    source: Path | None
    retained: Mapping[str, DataConfig] = field(init=False)
    """The data sets of `retain.data` by name."""

    def __post_init__(self) -> None:
        subjects = [subject.name for arm in self.arms if arm.confirm_each for subject in arm.subjects]
        (name, count), *_ = Counter([*subjects, *(arm.name for arm in self.arms)]).most_common(1)
        if count > 1:
            raise ConfigError(
                f"each value of `confirm_each` must have its own name, but {count} values or arms are named {name!r}. "
                "Choose values that differ in their first three digits, or rename the arm."
            )
        object.__setattr__(self, "retained", self._compose_retained())

    def _compose_retained(self) -> dict[str, DataConfig]:
        config = self.sweep_config
        frozen = [arm for arm in self.arms if arm.base.method.trains_nothing]
        if config.retain.data and not (frozen and config.confirm.list_looks()):
            raise ConfigError(
                "`retain.data` must be empty without a confirm stage and an arm with `method=frozen`, which are "
                f"compared, but names {join_words(list(config.retain.data))}. Write `confirm.seeds=[3,6,10]` and "
                "`arms.frozen={settings: {method: frozen}}`, or `retain.data={}`."
            )
        for arm in self.arms if config.retain.data else ():
            if (why := arm.base.capabilities.retains) is not True:
                raise ConfigError(
                    f"`retain.data` must be empty, but names {join_words(list(config.retain.data))}. {why}"
                )
        retained: dict[str, DataConfig] = {}
        for name, chosen in config.retain.data.items():
            require_folder_name("a name in `retain.data`", name)
            typed = {"data": chosen} if isinstance(chosen, str) else chosen
            with name_in_errors(f"`retain.data.{name}`"):
                if others := [key for key in typed if key.split(".")[0] != "data"]:
                    raise ConfigError(f"its settings must be `data` or begin with `data.`, but got `{others[0]}`.")
                model = {key: value for key, value in frozen[0].settings.items() if key.split(".")[0] != "data"}
                retained[name] = compose_run({**model, **typed}).data
        return retained

    def find_arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def read_definition(source: Path | Mapping[str, Any], overrides: SweepOverrides = NO_OVERRIDES) -> Definition:
    """Returns the checked definition of a sweep, from its file or content and from overrides.

    Raises:
        ConfigError: The file can't be read, a key or range is wrong, or an arm does not compose.
    """
    path = None if isinstance(source, Mapping) else source
    content = read_content(source)
    with name_in_errors(path.name) if path else nullcontext():
        return _define(content, overrides, source=path)


def restore_definition(raw: Mapping[str, Any], *, source: Path | None) -> Definition:
    """Returns the definition whose `raw` is given. Raises the errors of `read_definition`."""
    return _define(raw["file"], SweepOverrides.parse(raw["overrides"]), source=source)


def _define(content: Any, overrides: SweepOverrides, *, source: Path | None) -> Definition:
    file = build(SweepFile, content)
    common, arms = fold_sweep(file, overrides)
    sweep_config = compose_sweep(common)
    return Definition(
        name=file.name,
        description=file.description,
        arms=tuple(_build_arm(arm, sweep_config=sweep_config) for arm in arms),
        sweep_config=sweep_config,
        raw={"file": content, "overrides": dict(overrides.raw)},
        source=source,
    )


def _build_arm(arm: ArmSettings, *, sweep_config: SweepConfig) -> Arm:
    """Returns an arm, composed and checked at the ends of its ranges."""
    with name_in_errors(f"arm `{arm.name}`"):
        settings = {key: value for key, value in arm.settings.items() if key.split(".")[0] not in SWEEP_GROUPS}
        if given := [key for key in ("output", "resume") if key in settings]:
            raise ConfigError(
                f"`{given[0]}` must be left out, because the sweep names the folders of its runs, but got "
                f"{settings[given[0]]!r}. `sweep.output=DIR` names the sweep's folder, `--resume DIR` resumes a sweep."
            )
        ends = {key: range_.ends for key, range_ in arm.space.items()}
        lows = {key: values[0] for key, values in ends.items()}
        corners = [lows, *({**lows, key: value} for key, values in ends.items() for value in values[1:])]
        if len(ends) > 1:
            corners.append({key: values[-1] for key, values in ends.items()})
        base, *others = (compose_run({**settings, **params, **TRIAL_SETTINGS}) for params in corners)
    shared = None if arm.has_own_trials else sweep_config.sweep.trials or (None if arm.trials else DEFAULT_TRIALS)
    if shared and searches_one_key(arm.space):
        shared = math.ceil(shared / 2)  # one dimension needs fewer trials for the same regret
    return Arm(
        name=arm.name,
        base=base,
        space=arm.space,
        settings=settings,
        corner_configs=(base, *others),
        trials=(shared or arm.trials or 1) if arm.space else 1,
        sweep_config=sweep_config,
        confirm_each=arm.confirm_each,
    )


def describe_definition(definition: Definition) -> str:
    """Returns a sweep as YAML: its own settings, and all settings of each arm's runs.

    A swept key has its range as a value, in the form of a sweep file.
    """
    described = OmegaConf.create({"name": definition.name, **as_settings(definition.sweep_config), "arms": {}})
    for arm in definition.arms:
        settings = OmegaConf.create(as_settings(arm.base))
        for key, value in describe_space(arm.space).items():
            OmegaConf.update(settings, key, value, merge=False)
        described.arms[arm.name] = {"trials": arm.trials, **settings}
    return OmegaConf.to_yaml(described)


def searches_one_key(space: Space) -> bool:
    return sum(not range_.is_single for range_ in space.values()) == 1
