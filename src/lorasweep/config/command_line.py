"""Overrides on the command line in Hydra's syntax: read, checked and completed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from lorasweep.config.compose import (
    COMPONENT_SETTINGS,
    LIST_GROUPS,
    MAPPING_SETTINGS,
    Primary,
    default_options,
    group_options,
    hydra_session,
    known_keys,
    list_groups_without_default,
)
from lorasweep.errors import ConfigError
from lorasweep.wording import shorten


def parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Returns overrides as keys and values. Hydra's sweep syntax becomes a choice or a range as in a sweep file.

    `overrides` are words of the command line, or a mapping, which is returned as it is.

    Raises:
        ConfigError: A word is not of the form `key=value`.
    """
    return dict(overrides) if isinstance(overrides, Mapping) else dict(map(_read_override, _parse(overrides)))


def separate_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Returns the overrides of a run, those of Hydra's own settings, and the folders of `hydra.searchpath`."""
    run_overrides: list[str] = []
    hydra_overrides: list[str] = []
    search_path: list[str] = []
    for override in _parse(overrides):
        key = str(override.key_or_group)
        if key == "hydra.searchpath":
            paths = override.value()
            search_path += map(str, paths if isinstance(paths, list) else [paths])
        else:
            is_hydra_setting = re.match(r"hydra(\W|$)", key)
            (hydra_overrides if is_hydra_setting else run_overrides).append(str(override.input_line))
    return run_overrides, hydra_overrides, search_path


def describe_job(job: Sequence[str], overrides: Sequence[str]) -> str:
    """Returns the overrides of one job of a grid without those that all jobs have: `method.rank=4 seed=1`."""
    last = {override.key_or_group: override for override in _parse(overrides)}  # a key may be typed twice
    fixed = {key for key, override in last.items() if not override.is_sweep_override()}
    own = [override for override in _parse(job) if override.key_or_group not in fixed]
    return " ".join(str(override.input_line).lstrip("+") for override in own)


def add_double_plus(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of a run with `++` before keys that are no groups, so that Hydra accepts unknown keys too.

    An unknown key is an argument of a component, a key of an option that `--from` chooses, or a mistake, for which
    `compose_run` names the nearest key.
    """
    with hydra_session():
        groups = {*default_options("train"), *list_groups_without_default()}
    keys = [override.partition("=")[0] for override in overrides]
    are_plain = [key[0] not in "+~" and "/" not in key and key not in groups for key in keys]
    return [f"++{override}" if is_plain else override for override, is_plain in zip(overrides, are_plain, strict=True)]


def complete_override(prefix: str, typed: Sequence[str] = (), *, primaries: Sequence[Primary]) -> list[str]:
    """Returns the overrides that begin with `prefix`: a key with `=`, or after a group's `=` its options.

    `typed` are the words before it. The options of groups that they choose decide which keys exist.
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
        hint = f" If the value is a text, quote it for Hydra and for the shell: {quoted}." if is_text else ""
        raise ConfigError(f"an override must read `key=value`, but got {shorten(override, 200)}.{hint}") from error


def _read_override(override: Override) -> tuple[str, Any]:
    key, value = str(override.key_or_group), override._value
    if not key:
        raise ConfigError(f"an override must read `key=value`, but got {override.input_line!r}.")
    # keys of components and mappings are the user's own, so a plus may add them
    mappings = tuple(f"{name}." for name in (*COMPONENT_SETTINGS, *LIST_GROUPS, *MAPPING_SETTINGS))
    may_be_new = key in MAPPING_SETTINGS or key.startswith(mappings)
    if override.is_delete() or (override.is_add() and not may_be_new):
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
