"""The definition of a sweep: a sweep file and the command line's overrides, composed and checked for each arm."""

from __future__ import annotations

import glob
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution

from lorasweep.config.build import TARGET, as_settings, dotted_items
from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import (
    LIST_GROUPS,
    LIST_SETTINGS,
    build_run,
    compose_options,
    compose_run,
    compose_sweep,
    compose_values,
    is_hydra_override,
    merge_layers,
)
from lorasweep.config.data import DataConfig
from lorasweep.config.run import METHODS_ON_QUANTISED_BASE, RunConfig
from lorasweep.config.sweep import SweepConfig
from lorasweep.errors import ConfigError
from lorasweep.record import Subject, is_number
from lorasweep.sweep.definition.sweep_file import (
    Space,
    SweepFile,
    describe_space,
    list_corner_values,
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
SWEEP_GROUPS = tuple(f.name for f in fields(SweepConfig))
"""Groups of settings that belong to a sweep and not to its runs: the first part of their keys."""
QUANTIZATION = "model.quantization"
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


@contextmanager
def name_in_errors(what: str) -> Iterator[None]:
    """Puts a name, such as that of an arm, before the message of any ConfigError that is raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error


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
    content, overrides = _change_arms(raw["file"], raw["overrides"])
    file = parse_file(content)
    for_all = {key: value for key, value in overrides.items() if not key.startswith("arms.")}
    sweep_config = compose_sweep(_select(merge_layers(file.settings, for_all), of_sweep=True))
    own = {name: _strip(name, overrides) for name in file.arms}
    chosen = {name: _choose_overrides(name, file, for_all, own[name]) for name in file.arms}
    arms = [_build_arm(name, file, chosen[name], own[name]) for name in file.arms]
    # A wrong value at one end of a range raises here, because all corners are composed.
    known = {f"method.{f.name}" for arm in arms for corner in arm.corner_configs for f in fields(corner.method)}
    used = {*chain(*chosen.values()), *(f"arms.{name}.{key}" for name in own for key in own[name])}
    if unused := [key for key in overrides if key not in used]:
        raise ConfigError(
            f"`{unused[0]}` must be a setting of at least one arm ({', '.join(own)}), but is not."
            f"{suggest_nearest(unused[0], known)} Write `arms.ARM.KEY=VALUE` for one arm only."
        )
    _check_subjects(arms)
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
    """Returns the data sets of `retain.data` by name."""
    frozen = [arm for arm in arms if arm.corner_configs[0].method.trains_nothing]
    if config.retain.data and not (frozen and config.confirm.list_looks()):
        raise ConfigError(
            "`retain.data` must be empty without a confirm stage and an arm with `method=frozen`, which are compared, "
            f"but names {join_words(list(config.retain.data))}. Write `confirm.seeds=auto` and "
            "`arms.frozen={settings: {method: frozen}}`, or `retain.data={}`."
        )
    if config.retain.data and any(arm.corner_configs[0].module is not None for arm in arms):
        raise ConfigError(
            "`retain.data` must be empty with your own LightningModule, which scores its own data alone, but names "
            f"{join_words(list(config.retain.data))}."
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


def describe_definition(definition: Definition) -> str:
    """Returns a sweep as YAML: its own settings, and all settings of each arm's runs.

    A swept key has its range as a value, in the form of a sweep file.
    """
    described = OmegaConf.create({"name": definition.name, **as_settings(definition.sweep_config), "arms": {}})
    for arm in definition.arms:
        settings = OmegaConf.create(as_settings(arm.corner_configs[0]))
        for key, value in describe_space(arm.space).items():
            OmegaConf.update(settings, key, value, merge=False)
        described.arms[arm.name] = {"trials": arm.trials, **settings}
    return OmegaConf.to_yaml(described)


def _change_arms(content: Any, overrides: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Adds arms that are typed as `arms.NAME={settings: ...}`, and leaves out those typed as `arms.NAME=null`.

    Returns the changed content of the sweep file, and the other overrides.
    """
    typed = {key: value for key, value in overrides.items() if key.startswith("arms.") and key.count(".") == 1}
    arms = content.get("arms") if isinstance(content, Mapping) else None
    if not typed or not isinstance(arms, Mapping):  # `parse_file` refuses a file without arms
        return content, dict(overrides)
    for key, value in typed.items():
        if (key.removeprefix("arms.") in arms) is not (value is None):
            raise ConfigError(
                f"`{key}` must be the settings of a new arm, or null to leave out an arm of the sweep file "
                f"({', '.join(arms)}), but got {'null' if value is None else repr(value)}."
                f"{suggest_nearest(key, [f'arms.{name}' for name in arms])} "
                f"Set one key of an arm with `{key}.KEY=VALUE`."
            )
    changed = {**arms, **{key.removeprefix("arms."): value for key, value in typed.items()}}
    return (
        {**content, "arms": {name: arm for name, arm in changed.items() if arm is not None}},
        {key: value for key, value in overrides.items() if key not in typed},
    )


def make_paths_absolute(value: Any, key: str = "") -> Any:
    """Returns nested settings with absolute paths of files, so that the sweep can be resumed from any folder."""
    if isinstance(value, Mapping):
        return {name: make_paths_absolute(item, str(name)) for name, item in value.items()}
    # a name without a dot or slash may be a split of a data set on the hub, such as `train`
    may_be_split = key.endswith(PATH_KEYS) and not (isinstance(value, str) and ("/" in value or "." in value))
    is_path = isinstance(value, str) and key.endswith(PATH_KEYS) and not may_be_split
    return os.path.abspath(value) if is_path and any(glob.iglob(value, recursive=True)) else value


def _choose_overrides(name: str, file: SweepFile, for_all: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the overrides for all arms that apply to one arm, whose `own` overrides decide its method too.

    An override does not apply if the arm's method lacks the setting, or if it is a range and the arm searches nothing.
    """
    config = file.arms[name]
    layers = [file.settings, config.settings, _without_ranges(for_all), _without_ranges(own)]
    with name_in_errors(f"arm `{name}`"):
        method = compose_options("train", merge_layers(*layers))["method"]
    return {
        key: value
        for key, value in for_all.items()
        if (not key.startswith("method.") or key.split(".")[1] in method) and (config.space or not is_range(key, value))
    }


def _build_arm(name: str, file: SweepFile, for_all: Mapping[str, Any], own: Mapping[str, Any]) -> Arm:
    """Returns one arm, composed and checked, with the overrides for all arms that apply to it, and its own."""
    config, own = file.arms[name], dict(own)
    require_folder_name("an arm's name", name)
    if name.endswith(CONFIRM_ENDING):
        raise ConfigError(f"an arm's name must not end in `{CONFIRM_ENDING}`, but got {name!r}. Rename the arm.")
    with name_in_errors(f"arm `{name}`"):
        confirm_each = own.pop("confirm_each", config.confirm_each)
        has_own_trials = "trials" in own
        if has_own_trials:
            own["sweep.trials"] = own.pop("trials")
        # Later settings win: sweep file, its arm, then the command line.
        settings = merge_layers(file.settings, config.settings, _without_ranges(for_all), _without_ranges(own))
        if given := [key for key in ("output", "resume") if key in settings]:
            raise ConfigError(
                f"`{given[0]}` must be left out, because the sweep names the folders of its runs, but got "
                f"{settings[given[0]]!r}. `sweep.output=DIR` names the sweep's folder, `--resume DIR` resumes a sweep."
            )
        ranges = _replace_ranges(config.space, merge_layers(for_all, own))
        settings = {key: value for key, value in settings.items() if not any(_is_inside(key, one) for one in ranges)}
        sweep_config = compose_sweep(_select(settings, of_sweep=True))
        settings = _select(settings)
        values = compose_values("train", settings)
        inherits_base = {"model", QUANTIZATION}.isdisjoint([*config.settings, *own])  # else an arm's own is refused
        trains_base = values["method"]["name"] not in METHODS_ON_QUANTISED_BASE
        if inherits_base and trains_base and values["model"]["quantization"] != "none":
            settings[QUANTIZATION] = values["model"]["quantization"] = "none"
        values = as_settings(build_run(values))
        space = {
            key: parse_range(key, range_, is_whole=_is_whole(key, range_, values)) for key, range_ in ranges.items()
        }
    if not config.space and not space and (config.trials or 1) != 1:
        raise ConfigError(
            f"`arms.{name}.trials` must be 1 for an arm without a space, but got {config.trials!r}. Add a `space`."
        )
    shared = sweep_config.sweep.trials or (DEFAULT_TRIALS if config.trials is None else None)
    if shared and not has_own_trials and sum(not range_.single() for range_ in space.values()) == 1:
        shared = math.ceil(shared / 2)  # one dimension needs fewer trials for the same regret
    arm = Arm(
        name=name,
        settings=settings,
        space=space,
        trials=(shared or config.trials or 1) if space else 1,
        sweep_config=sweep_config,
        confirm_each=confirm_each,
    )
    range_ = None if confirm_each is None else space.get(confirm_each)
    if confirm_each is not None and not (isinstance(range_, CategoricalDistribution) and len(range_.choices) > 1):
        raise ConfigError(
            f"`arms.{name}.confirm_each` must be a swept key with a list of at least two choices, but got "
            f"{confirm_each!r}.{suggest_nearest(str(confirm_each), space)} Write it in `space`, such as "
            "`method.rank: [1, 4, 16]`."
        )
    return arm


def _replace_ranges(space: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an arm's swept keys with their ranges, after overrides.

    A typed range replaces the file's. A typed value ends the search of its key, and of keys above and below it.
    """
    ranges = {key: value for key, value in typed.items() if is_range(key, value)}
    kept = {
        key: value
        for key, value in space.items()
        if key in ranges or not any(_is_inside(key, one) or _is_inside(one, key) for one in typed)
    }
    return kept | ranges  # a key stays in its place, because samplers see the keys in their order


def _check_subjects(arms: Sequence[Arm]) -> None:
    """Raises ConfigError if two values of `confirm_each` have the same name, or one has the name of an arm."""
    subjects = [subject.name for arm in arms if arm.confirm_each for subject in arm.subjects]
    (name, count), *_ = Counter([*subjects, *(arm.name for arm in arms)]).most_common(1)
    if count > 1:
        raise ConfigError(
            f"each value of `confirm_each` must have its own name, but {count} values or arms are named {name!r}. "
            "Choose values that differ in their first three digits, or rename the arm."
        )


def _strip(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the overrides of one arm without `arms.NAME.` before their keys."""
    prefix = f"arms.{name}."
    return {key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)}


def _select(settings: Mapping[str, Any], *, of_sweep: bool = False) -> dict[str, Any]:
    """Returns the settings of runs, or those of the sweep."""
    return {key: value for key, value in settings.items() if (key.split(".")[0] in SWEEP_GROUPS) is of_sweep}


def _is_inside(key: str, other: str) -> bool:
    """Returns whether a key equals another key or lies below it, as `sampler.seed` below `sampler`."""
    return key == other or ("." in other and key.startswith(f"{other}."))


def _without_ranges(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not is_range(key, value)}


def is_range(key: str, value: Any) -> bool:
    """Returns whether an override searches its key. Loggers, lists of layers, patterns and components are values."""
    if key.split(".")[0] in SWEEP_GROUPS:  # such as `confirm.looks=[3,6]`
        return False
    if isinstance(value, Mapping):
        return not {"low", "high"}.isdisjoint(value) and TARGET not in value
    return isinstance(value, list) and key not in (*LIST_GROUPS, *LIST_SETTINGS)


def _is_whole(key: str, range_: Any, values: Mapping[str, Any]) -> bool:
    """Returns whether a swept key holds whole numbers, from its value in an arm's composed settings."""
    known = dict(dotted_items(values))
    if key in known:
        return type(known[key]) is int
    # an argument with a default in its class; an unknown key raises when `corner_configs` are composed
    return isinstance(range_, Mapping) and all(isinstance(bound, int) for bound in range_.values())
