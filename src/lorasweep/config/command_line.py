"""Overrides on the command line in Hydra's syntax: parsed, written, and listed by group."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep, Sweep
from hydra.errors import HydraException

from lorasweep.config.compose import default_options, hydra_session, packaged_folder
from lorasweep.errors import ConfigError
from lorasweep.wording import shorten

MAX_RANGE_VALUES = 100_000
"""Maximum number of values of `range(...)`, because a grid lists all of them."""


def parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Returns overrides as keys and values. Hydra's sweep syntax becomes a choice or a range as in a sweep file.

    `overrides` are words of the command line, or a mapping, which is returned as it is. Words that Hydra alone applies,
    such as `+experiment=low_memory` and `~logger`, become keys.

    Raises:
        ConfigError: A word is not of the form `key=value`, or its value is not allowed.
    """
    return dict(overrides) if isinstance(overrides, Mapping) else dict(map(_read_override, _parse(overrides)))


def _read_override(override: Override) -> tuple[str, Any]:
    key, value = str(override.key_or_group), override._value
    if not key:
        raise ConfigError(f"an override must read `key=value`, but got {override.input_line!r}.")
    groups = {*default_options("train"), *default_options("sweep"), "experiment"}
    if key in groups and not isinstance(value, Sweep | Glob):
        options = override.value()
        named = options if isinstance(options, list) else [] if override.is_delete() and options is None else [options]
        if not all(isinstance(option, str) for option in named):
            choices = ", ".join(_list_options(key))
            raise ConfigError(f"`{key}` must be one of {choices}, but got {override.input_line!r}.")
    if override.is_delete() or (override.is_add() and "." not in key):  # `+experiment=NAME`
        return str(override.input_line), None
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # Lightning gives the folder to the processes that it starts
    if key.startswith(("hydra.run", "hydra.output_subdir", "hydra.job.chdir")) and is_first:
        raise ConfigError(
            f"`{key}` must be left out, because it does not place the files of a run or sweep, but got "
            f"{override.input_line!r}. Name the folder by `output=DIR`, and that of a sweep by `sweep.output=DIR`."
        )
    if isinstance(value, Glob):
        raise ConfigError(f"`{key}` must be a value, a list or a range, but got {override.input_line!r}.")
    if isinstance(value, ChoiceSweep):
        return key, list(override.sweep_iterator(transformer=Override._convert_value))
    if isinstance(value, RangeSweep):
        try:
            values = list(itertools.islice(value.range(), MAX_RANGE_VALUES + 1))  # without `stop`, as in Python
        except (HydraException, ValueError):  # the step is 0
            values = []
        if not 0 < len(values) <= MAX_RANGE_VALUES:
            raise ConfigError(
                f"`{key}` must be a range of 1 to {MAX_RANGE_VALUES:,} values, but got {override.input_line!r}. "
                "`interval(LOW,HIGH)` allows every value between two numbers."
            )
        return key, {"low": value.start, "high": values[-1], "step": value.step}
    if isinstance(value, IntervalSweep):
        log = {"log": True} if "log" in value.tags else {}
        return key, {"low": value.start, "high": value.end, **log}
    return key, override.value()


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        try:
            parsed += parser.parse_overrides([override])
        except HydraException as error:
            key, _, value = override.partition("=")
            is_text = value and value[0] not in "[{'\"" and not value.isdigit()
            quoted = shlex.quote(f'{key}="{value}"')
            hint = f" If the value is a text, quote it for Hydra and for the shell: {quoted}." if is_text else ""
            raise ConfigError(f"an override must read `key=value`, but got {shorten(override, 200)}.{hint}") from error
    return parsed


def format_override(key: str, value: Any) -> str:
    """Returns an override, quoted for a shell, that `parse_overrides` turns back into this key and value."""
    return shlex.quote(f"{key}={_format_value(value)}")


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_format_value(one)}' for name, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_format_value, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if not isinstance(value, str):
        return str(value)
    if re.fullmatch(r"[A-Za-z_/][\w/.-]*", value) and value.lower() not in ("true", "false", "null", "nan", "inf"):
        return value
    # Hydra reads a backslash as an escape only in front of a quote
    quoted = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return f'"{quoted}"'


def describe_job(job: Sequence[str], overrides: Sequence[str]) -> str:
    """Returns the overrides of one job of a grid without those that all jobs have: `method.rank=4 seed=1`."""
    last = {override.key_or_group: override for override in _parse(overrides)}  # a key may be typed twice
    fixed = {key for key, override in last.items() if not override.is_sweep_override()}
    own = [override for override in _parse(job) if override.key_or_group not in fixed]
    return " ".join(str(override.input_line).lstrip("+") for override in own)


def add_double_plus(overrides: Sequence[str]) -> list[str]:
    """Returns overrides with `++` before keys that are no groups, so that Hydra accepts unknown keys too.

    An unknown key is an argument of a component, a key of an option that `--from` chooses, or a mistake, for which
    `build_run` names the nearest key.
    """

    def is_plain(key: str) -> bool:
        return not key.startswith(("+", "~", "hydra")) and not (packaged_folder("conf") / key).is_dir()

    return [f"++{override}" if is_plain(override.partition("=")[0]) else override for override in overrides]


def describe_groups() -> str:
    """Returns one line for each group of settings, and for each group that `+GROUP=` adds, with its options."""
    groups = {group: group for group in (*default_options("train"), *default_options("sweep"))}
    groups |= {f"+{group}": group for group in _list_added_groups()}
    lines = [f"  {shown}={'|'.join(_list_options(group))}" for shown, group in groups.items()]
    return "\n".join(["groups of settings, and the options of each:", *lines])


def _list_options(group: str) -> list[str]:
    with hydra_session():
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


def _list_added_groups() -> list[str]:
    """Returns the groups of `lorasweep train` without a default, such as `experiment`."""
    with hydra_session():
        groups = GlobalHydra.instance().config_loader().list_groups("")
    return sorted({*groups} - {*default_options("train"), *default_options("sweep"), "hydra"})
