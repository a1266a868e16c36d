"""Overrides on the command line in Hydra's syntax: read, checked and completed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf

from lorasweep.config.compose import (
    COMPONENTS,
    LIST_GROUPS,
    MAPPINGS,
    compose_run,
    default_options,
    group_options,
    hydra_session,
    known_keys,
    layer_settings,
    refuse_resolvers,
)
from lorasweep.config.yaml_file import load_yaml
from lorasweep.errors import ConfigError, first_line


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Returns overrides as keys and values. Hydra's sweep syntax becomes a choice or a range as in a sweep file.

    Raises:
        ConfigError: An override is not of the form `key=value`.
    """
    return dict(map(_read_override, _parse(overrides)))


def read_settings_file(path: Path) -> dict[str, Any]:
    """Returns the dotted keys and values of a YAML file.

    Raises:
        ConfigError: The file is missing, or does not hold keys and values.
    """
    try:
        settings: Any = OmegaConf.to_container(load_yaml(path))
    except Exception as error:  # PyYAML and OmegaConf raise errors of many classes
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise ConfigError(f"{str(path)!r} must be a YAML file of settings, but can't be read: {reason}.") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{str(path)!r} must hold lines such as `optim.lr: 0.001`, but got {settings!r}.")
    refuse_resolvers(settings)
    return settings


def check_train_arguments(arguments: Sequence[str], file_settings: Mapping[str, Any] = {}) -> None:
    """Checks the arguments of `lorasweep train` before Hydra does, so that every error is one sentence.

    Every run of a grid (`-m method.rank=1,4`) is checked before the first one trains. The arguments win over the
    settings of a file.

    Raises:
        ConfigError: An argument is no override, or a key or value is wrong.
    """
    flags, unknown = get_args_parser().parse_known_args(list(arguments))
    values: dict[str, list[Any]] = {}
    for override in _parse([*flags.overrides, *unknown]):
        if override.key_or_group.startswith("hydra"):
            continue
        key, value = _read_override(override)
        if isinstance(override._value, RangeSweep | IntervalSweep):
            raise ConfigError(
                f"a range is for `lorasweep sweep`, but got {override.input_line!r}. "
                f"Give values: `{key}=1,2,4` with `-m`."
            )
        if override.is_sweep_override() and not flags.multirun:
            raise ConfigError(f"`{key}` must have one value, but got {value!r}. Add `-m` to run each of them.")
        values[key] = value if override.is_sweep_override() else [value]
    trains = not (flags.help or flags.cfg or flags.info)
    if file_settings and not trains:  # for these flags Hydra shows the settings, without those of the file
        raise ConfigError("`--cfg`, `--info` and `--help` must be used without a file of settings or `--from`.")
    for combination in itertools.product(*values.values()):
        settings = layer_settings("train", file_settings, dict(zip(values, combination, strict=True)))
        compose_run(settings, require_all=trains)


def allow_new_arguments(arguments: Sequence[str]) -> list[str]:
    """Returns the overrides with `++` before each key that Hydra's own settings may lack, so that Hydra accepts it."""
    return [f"++{argument}" if _may_be_new(argument.partition("=")[0]) else argument for argument in arguments]


def complete_override(prefix: str) -> list[str]:
    """Returns the overrides that begin with a prefix: a key with `=`, or after a group's `=` its options."""
    groups = {*default_options("train"), *default_options("sweep")}
    key, has_value, _ = prefix.partition("=")
    if not has_value:
        keys = groups | known_keys({}, primary="train") | known_keys({}, primary="sweep")
        return [f"{name}=" for name in sorted(keys) if name.startswith(key)]
    if key not in groups:
        return []
    with hydra_session():
        return [f"{key}={option}" for option in group_options(key) if f"{key}={option}".startswith(prefix)]


def _may_be_new(key: str) -> bool:
    """Returns whether a key is an argument of a component, or a mapping or an entry of one."""
    return key in MAPPINGS or key.startswith(tuple(f"{name}." for name in (*COMPONENTS, *LIST_GROUPS, *MAPPINGS)))


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"an override must read `key=value`, but got {first_line(error)}") from error


def _read_override(override: Override) -> tuple[str, Any]:
    key, value = str(override.key_or_group), override._value
    is_group = key in {*default_options("train"), *default_options("sweep")}
    # Hydra refuses these too: `+` before a key that exists, `++` before a group
    is_refused = (override.is_add() and not _may_be_new(key)) or (override.is_force_add() and is_group)
    if not key or override.is_delete() or is_refused:
        raise ConfigError(
            f"an override must read `key=value`, but got {override.input_line!r}. Leave out any `+` or `~`."
        )
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
