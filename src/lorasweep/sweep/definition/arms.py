"""The definition of a sweep: a sweep file and the command line's overrides, composed and checked for each arm."""

from __future__ import annotations

import glob
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution

from lorasweep.config.build import as_settings, dotted_items
from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import compose_run, compose_sweep, is_hydra_override
from lorasweep.config.data import DataConfig
from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import SweepConfig
from lorasweep.errors import ConfigError
from lorasweep.record import Subject, is_number
from lorasweep.sweep.definition.sweep_file import (
    SWEEP_GROUPS,
    ArmConfig,
    Space,
    apply_overrides,
    change_arms,
    describe_space,
    list_corner_values,
    name_in_errors,
    parse_file,
    parse_range,
    read_content,
    require_folder_name,
)
from lorasweep.wording import join_words, suggest_nearest

DEFAULT_TRIALS = 16
"""Number of trials of an arm that searches several keys, if neither sweep file nor command line sets it."""
CONFIRM_ENDING = "-confirm"
"""An ending that an arm's name must not have. The folder of a confirm run has the name of its arm, this ending and a
number."""
PATH_KEYS = ("data.train", "data.validation", "data.test", "model.path")
"""Settings whose values may be paths of files."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method, or one method at one rank, with its own search space, budget and study."""

    name: str
    settings: Mapping[str, Any]
    space: Space
    trials: int
    sweep_config: SweepConfig
    confirm_each: str | None = None
    """The swept key whose choices are confirmed one by one."""

    @cached_property
    def subjects(self) -> tuple[Subject, ...]:
        """What the confirm stage compares: the arm itself, or each value of `confirm_each`, numbers ascending."""
        key = self.confirm_each
        values = [None] if key is None else list_corner_values(self.space[key])
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
            return compose_run({**self.settings, **params, "trainer.progress": False})

    @property
    def base(self) -> RunConfig:
        """Settings of a run with every swept key at its first end."""
        return self.corner_configs[0]

    @cached_property
    def corner_configs(self) -> tuple[RunConfig, ...]:
        """Settings of runs at the ends of the swept ranges. The choices of a list are its ends.

        The first run has every key at its first end. The next runs each move one key to another of its ends. The last
        run has every key at its last end.
        """
        ends = {key: list_corner_values(distribution) for key, distribution in self.space.items()}
        lows = {key: values[0] for key, values in ends.items()}
        corners = [lows, *({**lows, key: value} for key, values in ends.items() for value in values[1:])]
        if len(ends) > 1:
            corners.append({key: values[-1] for key, values in ends.items()})
        return tuple(map(self.compose, corners))


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
    retained: Mapping[str, DataConfig]
    """The data sets of `retain.data` by name."""

    def find_arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def read_definition(source: Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Definition:
    """Returns the checked definition of a sweep, from its file or content and from overrides.

    Overrides are command-line arguments, or a mapping of dotted keys to values.

    Raises:
        ConfigError: The file can't be read, a key or range is wrong, or an arm does not compose.
    """
    raw = make_paths_absolute({"file": read_content(source), "overrides": parse_overrides(overrides)})
    if isinstance(source, Mapping):
        return restore_definition(raw, source=None)
    try:
        return restore_definition(raw, source=source)
    except ConfigError as error:
        raise ConfigError(f"{source.name}: {error}") from error


def restore_definition(raw: Mapping[str, Any], *, source: Path | None) -> Definition:
    """Returns the definition whose `raw` is given. Raises the errors of `read_definition`."""
    for key in filter(is_hydra_override, raw["overrides"]):
        raise ConfigError(
            f"a sweep's override must read `key=value`, but got {key!r}. `+` and `~` are for `lorasweep train`; write "
            "a value, an option such as `logger=none`, or `arms.ARM=null` to leave out an arm."
        )
    content, overrides = change_arms(raw["file"], raw["overrides"])
    file = apply_overrides(parse_file(content), overrides)
    sweep_config = compose_sweep(_select(file.settings, of_sweep=True))
    arms = [_build_arm(name, arm_config) for name, arm_config in file.arms.items()]
    subjects = [subject.name for arm in arms if arm.confirm_each for subject in arm.subjects]
    (name, count), *_ = Counter([*subjects, *(arm.name for arm in arms)]).most_common(1)
    if count > 1:
        raise ConfigError(
            f"each value of `confirm_each` must have its own name, but {count} values or arms are named {name!r}. "
            "Choose values that differ in their first three digits, or rename the arm."
        )
    for arm in arms:  # they are compared, so they share the confirm stage
        for group in ("confirm", "retain"):
            if getattr(arm.sweep_config, group) != getattr(sweep_config, group):
                raise ConfigError(
                    f"`{group}` must be the same for all arms, because they are compared, but arm `{arm.name}` changes "
                    "it. Set it once for the whole sweep."
                )
    return Definition(
        name=file.name,
        description=file.description,
        arms=tuple(arms),
        sweep_config=sweep_config,
        raw={"file": raw["file"], "overrides": dict(raw["overrides"])},
        source=source,
        retained=_compose_retained(sweep_config, arms),
    )


def _compose_retained(config: SweepConfig, arms: Sequence[Arm]) -> dict[str, DataConfig]:
    frozen = [arm for arm in arms if arm.base.method.trains_nothing]
    if config.retain.data and not (frozen and config.confirm.list_looks()):
        raise ConfigError(
            "`retain.data` must be empty without a confirm stage and an arm with `method=frozen`, which are compared, "
            f"but names {join_words(list(config.retain.data))}. Write `confirm.seeds=auto` and "
            "`arms.frozen={settings: {method: frozen}}`, or `retain.data={}`."
        )
    for arm in arms if config.retain.data else ():
        if (why := arm.base.capabilities.retains) is not True:
            raise ConfigError(f"`retain.data` must be empty, but names {join_words(list(config.retain.data))}. {why}")
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


def make_paths_absolute(value: Any, key: str = "") -> Any:
    """Returns nested settings with absolute paths of files, so that the sweep can be resumed from any folder."""
    if isinstance(value, Mapping):
        return {name: make_paths_absolute(item, str(name)) for name, item in value.items()}
    # a name without a dot or slash may be a split of a data set on the hub, such as `train`
    may_be_split = key.endswith(PATH_KEYS) and not (isinstance(value, str) and ("/" in value or "." in value))
    is_path = isinstance(value, str) and key.endswith(PATH_KEYS) and not may_be_split
    return os.path.abspath(value) if is_path and any(glob.iglob(value, recursive=True)) else value


def _build_arm(name: str, config: ArmConfig) -> Arm:
    """Returns one arm of a sweep file with its overrides, composed and checked."""
    require_folder_name("an arm's name", name)
    if name.endswith(CONFIRM_ENDING):
        raise ConfigError(f"an arm's name must not end in `{CONFIRM_ENDING}`, but got {name!r}. Rename the arm.")
    with name_in_errors(f"arm `{name}`"):
        if given := [key for key in ("output", "resume") if key in config.settings]:
            raise ConfigError(
                f"`{given[0]}` must be left out, because the sweep names the folders of its runs, but got "
                f"{config.settings[given[0]]!r}. `sweep.output=DIR` names the sweep's folder, `--resume DIR` resumes a "
                "sweep."
            )
        sweep_config, settings = compose_sweep(_select(config.settings, of_sweep=True)), _select(config.settings)
        values = as_settings(compose_run(settings))
        space = {
            key: parse_range(key, range_, is_whole=_is_whole(key, range_, values))
            for key, range_ in config.space.items()
        }
    if not space and (config.trials or 1) != 1:
        raise ConfigError(
            f"`arms.{name}.trials` must be 1 for an arm without a space, but got {config.trials!r}. Add a `space`."
        )
    shared = sweep_config.sweep.trials or (DEFAULT_TRIALS if config.trials is None else None)
    if shared and sum(not range_.single() for range_ in space.values()) == 1:
        shared = math.ceil(shared / 2)  # one dimension needs fewer trials for the same regret
    arm = Arm(
        name=name,
        settings=settings,
        space=space,
        trials=(shared or config.trials or 1) if space else 1,
        sweep_config=sweep_config,
        confirm_each=config.confirm_each,
    )
    range_ = space.get(config.confirm_each or "")
    if config.confirm_each and not (isinstance(range_, CategoricalDistribution) and len(range_.choices) > 1):
        near = "" if range_ else suggest_nearest(config.confirm_each, space)
        raise ConfigError(
            f"`arms.{name}.confirm_each` must be a swept key with a list of at least two choices, but got "
            f"{config.confirm_each!r}.{near} Write it in `space`, such as `method.rank: [1, 4, 16]`, or set "
            f"`arms.{name}.confirm_each=null`."
        )
    return arm


def _select(settings: Mapping[str, Any], *, of_sweep: bool = False) -> dict[str, Any]:
    """Returns the settings of runs, or those of the sweep."""
    return {key: value for key, value in settings.items() if (key.split(".")[0] in SWEEP_GROUPS) is of_sweep}


def _is_whole(key: str, range_: Any, values: Mapping[str, Any]) -> bool:
    """Returns whether a swept key holds whole numbers, from its value in an arm's composed settings."""
    known = dict(dotted_items(values))
    if key in known:
        return type(known[key]) is int
    # an argument with a default in its class; an unknown key raises when `corner_configs` are composed
    return isinstance(range_, Mapping) and all(isinstance(bound, int) for bound in range_.values())
