"""Overrides on the command line in Hydra's syntax: read, checked and completed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from lorasweep.config.compose import (
    COMPONENT_SETTINGS,
    LIST_GROUPS,
    MAPPING_SETTINGS,
    Primary,
    default_options,
    describe_hydra_error,
    group_options,
    hydra_session,
    known_keys,
    list_groups_without_default,
)
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import shorten

OPTUNA_SWEEPER = "hydra-optuna-sweeper"
"""Its last release needs Optuna 2, the pre-release 1.4 takes Optuna 5."""


def parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Returns overrides as keys and values. Hydra's sweep syntax becomes a choice or a range as in a sweep file.

    Overrides are words of the command line, or keys and values already.

    Raises:
        ConfigError: A word is not of the form `key=value`.
    """
    return dict(overrides) if isinstance(overrides, Mapping) else dict(map(_read_override, _parse(overrides)))


def read_settings_file(path: Path) -> dict[str, Any]:
    """Returns the dotted keys and values of a YAML file.

    Raises:
        ConfigError: The file is missing, or does not hold keys and values.
    """
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # PyYAML and OmegaConf raise errors of many classes
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise ConfigError(f"{str(path)!r} must be a YAML file of settings, but can't be read: {reason}.") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{str(path)!r} must hold lines such as `optim.lr: 0.001`, but got {settings!r}.")
    return settings


@dataclass(frozen=True, kw_only=True)
class TrainOverrides:
    """The overrides of `lorasweep train`, sorted by who reads them."""

    run: tuple[str, ...]
    """Overrides of the run's settings."""
    hydra: tuple[str, ...]
    """Overrides of Hydra's own settings: `hydra/launcher=joblib`."""
    search_path: tuple[str, ...]
    """Folders and packages of `hydra.searchpath`."""


def sort_overrides(overrides: Sequence[str]) -> TrainOverrides:
    """Separates the overrides of a run from those of Hydra.

    Raises:
        ConfigError: A word is not an override.
    """
    run: list[str] = []
    hydra: list[str] = []
    search_path: list[str] = []
    for override in _parse(overrides):
        key = str(override.key_or_group)
        if key == "hydra.searchpath":
            paths = override.value()
            search_path += map(str, paths if isinstance(paths, list) else [paths])
        else:
            (hydra if re.match(r"hydra(\W|$)", key) else run).append(str(override.input_line))
    return TrainOverrides(run=tuple(run), hydra=tuple(hydra), search_path=tuple(search_path))


def list_jobs(overrides: TrainOverrides, *, is_grid: bool) -> list[list[str]] | None:
    """Returns the overrides of each job: one job, or every combination of a grid.

    Args:
        overrides: The overrides.
        is_grid: Whether to run several jobs (`-m`).

    Returns:
        None if a sweeper other than Hydra's own decides at run time which jobs there are.

    Raises:
        ConfigError: Hydra refuses its settings, or an override has several values without `-m`.
    """
    with hydra_session():
        groups = list_groups_without_default()  # an experiment may set `hydra.sweeper`
        fixed = [override for override in _parse(overrides.run) if not override.is_sweep_override()]
        added = [
            str(override.input_line) for override in fixed if override.is_add() and override.key_or_group in groups
        ]
        try:
            hydra = compose("train", overrides=[*added, *overrides.hydra], return_hydra_config=True).hydra
        except HydraException as error:
            raise ConfigError(f"{describe_hydra_error(error)}{_name_plugin(overrides.hydra)}") from error
        except (AttributeError, AssertionError) as error:  # OmegaConf's, about a key inside null
            raise ConfigError(f"Hydra can't apply {' '.join(overrides.hydra)!r}: {first_line(error)}.") from error
        if not is_grid:
            for override in _parse(overrides.run):
                if override.is_sweep_override():
                    raise ConfigError(
                        f"`{override.key_or_group}` must have one value, but got {override.input_line!r}. "
                        "Add `-m` to run each of several values; ranges are for `lorasweep sweep`."
                    )
            return [list(overrides.run)]
        if hydra.sweeper._target_ != BasicSweeperConf._target_:
            return None
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        params = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
        try:
            (jobs,) = BasicSweeper.split_arguments(
                parser.parse_overrides([*params, *overrides.run]), max_batch_size=None
            )
        except HydraException as error:  # an interval
            raise ConfigError(
                f"`-m` must have values, such as `method.rank=1,2,4` or `method.rank=range(1,5)`, but "
                f"{first_line(error)}. Use `lorasweep sweep` to search an interval."
            ) from error
    return jobs


def describe_job(job: Sequence[str], overrides: Sequence[str]) -> str:
    """Returns the overrides of one job of a grid without those that all jobs have: `method.rank=4 seed=1`."""
    last = {override.key_or_group: override for override in _parse(overrides)}  # a key may be typed twice
    fixed = {key for key, override in last.items() if not override.is_sweep_override()}
    own = [override for override in _parse(job) if override.key_or_group not in fixed]
    return " ".join(str(override.input_line).lstrip("+") for override in own)


def _name_plugin(overrides: Sequence[str]) -> str:
    """Returns a sentence that names the packages of the launcher and sweeper that overrides choose."""
    chosen = [re.match(r"hydra/(launcher|sweeper)=([a-z]+)", override) for override in overrides]
    packages = [f"hydra-{plugin[2]}-{plugin[1]}" for plugin in chosen if plugin]
    commands = [f"`pip install {'--pre ' if package == OPTUNA_SWEEPER else ''}{package}`" for package in packages]
    return f" A launcher or sweeper must be installed: {', '.join(commands)}." if commands else ""


def force_keys(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of a run with `++` before dotted keys, so that Hydra also takes keys that it does not know.

    These are arguments of a component, and keys of the option that a file of settings chooses.
    """
    keys = [override.partition("=")[0] for override in overrides]
    are_plain = ["." in key and key[0] not in "+~" for key in keys]
    return [f"++{override}" if is_plain else override for override, is_plain in zip(overrides, are_plain, strict=True)]


def complete_override(prefix: str, typed: Sequence[str] = (), *, primaries: Sequence[Primary]) -> list[str]:
    """Returns the overrides that begin with a prefix: a key with `=`, or after a group's `=` its options.

    Args:
        prefix: The typed beginning of the word to complete.
        typed: The words before it. Their options of groups decide which keys there are.
        primaries: The primary configs whose keys the command takes.
    """
    key, has_value, _ = prefix.partition("=")
    sign, name = (key[: -len(key.lstrip("+~"))], key.lstrip("+~")) if key.lstrip("+~") else (key, "")
    with hydra_session():
        if has_value:
            return [f"{key}={option}" for option in group_options(name) if f"{key}={option}".startswith(prefix)]
        if sign == "+":
            return [f"+{group}=" for group in list_groups_without_default() if group.startswith(name)]
    keys = {known for primary in primaries for known in (*default_options(primary), *_known_keys(typed, primary))}
    return [f"{sign}{known}{'' if sign == '~' else '='}" for known in sorted(keys) if known.startswith(name)]


def _known_keys(typed: Sequence[str], primary: Primary) -> set[str]:
    chosen = {}
    with suppress(ConfigError):
        chosen = {key: value for key, value in parse_overrides(typed).items() if key in default_options(primary)}
        return known_keys(chosen, primary=primary)
    return known_keys({}, primary=primary)


def describe_groups(*primaries: Primary) -> str:
    """Returns a line with the options of each group of primary configs, and of each group that `+GROUP=` adds."""
    with hydra_session():
        groups = [group for primary in primaries for group in default_options(primary)]
        lines = [f"  {group}={'|'.join(group_options(group))}" for group in groups]
        if "train" in primaries:
            lines += [f"  +{group}={'|'.join(group_options(group))}" for group in list_groups_without_default()]
    return "\n".join(["groups of settings, and the options of each:", *lines])


def _may_be_new(key: str) -> bool:
    """Returns whether a key is an argument of a component, or a mapping or an entry of one."""
    return key in MAPPING_SETTINGS or key.startswith(
        tuple(f"{name}." for name in (*COMPONENT_SETTINGS, *LIST_GROUPS, *MAPPING_SETTINGS))
    )


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    return [_parse_one(parser, override) for override in overrides]


def _parse_one(parser: OverridesParser, override: str) -> Override:
    try:
        return parser.parse_overrides([override])[0]
    except (HydraException, ValueError) as error:  # ValueError: a number of more than 4,300 digits
        key, _, value = override.partition("=")
        is_text = value and value[0] not in "[{'\"" and not value.isdigit()
        quoted = shlex.quote(f'{key}="{value}"')
        hint = f" If the value is a text, keep quotes around it from the shell: {quoted}." if is_text else ""
        raise ConfigError(f"an override must read `key=value`, but got {shorten(override, 200)}.{hint}") from error


def _read_override(override: Override) -> tuple[str, Any]:
    key, value = str(override.key_or_group), override._value
    if not key:
        raise ConfigError(f"an override must read `key=value`, but got {override.input_line!r}.")
    if override.is_delete() or (override.is_add() and not _may_be_new(key)):
        return str(override.input_line), None  # Hydra applies it
    if override.is_force_add() and key in {*default_options("train"), *default_options("sweep")}:
        raise ConfigError(f"`{key}` must be chosen without a plus, but got {override.input_line!r}.")
    if isinstance(value, Glob):
        raise ConfigError(f"`{key}` must be a value, a list or a range, but got {override.input_line!r}.")
    if isinstance(value, ChoiceSweep):
        return key, list(override.sweep_iterator(transformer=Override._convert_value))
    if isinstance(value, RangeSweep):
        values = list(value.range())  # without `stop`, as in Python
        if not values:
            raise ConfigError(f"`{key}` must be a range that is not empty, but got {override.input_line!r}.")
        return key, {"low": value.start, "high": values[-1], "step": value.step}
    if isinstance(value, IntervalSweep):
        log = {"log": True} if "log" in value.tags else {}
        return key, {"low": value.start, "high": value.end, **log}
    return key, override.value()
