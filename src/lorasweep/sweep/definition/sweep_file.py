"""Finds and reads a sweep file, and checks its keys and ranges."""

from __future__ import annotations

import glob
import json
import math
import os
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic.dataclasses import dataclass

from lorasweep.config.build import Positive, Settings
from lorasweep.config.compose import packaged_folder
from lorasweep.config.sweep import MAX_ARMS, MAX_CHOICES
from lorasweep.errors import ConfigError, first_line
from lorasweep.record import SWEEP_FILE, is_number
from lorasweep.wording import suggest_nearest

MAX_NAME_CHARACTERS = 100
"""Maximum length of the name of a sweep or an arm. It becomes part of a folder's name, whose length is limited."""

PATH_KEYS = ("data.train", "data.validation", "data.test", "model.path")
"""Settings whose values may be paths of files."""
RANGE_KEYS = ("low", "high", "log", "step")
Space = dict[str, BaseDistribution]
"""The distribution of each swept key."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig(Settings):
    """One arm as in a sweep file."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys and values of this arm, which replace settings of the whole sweep."""
    space: Mapping[str, Any] = field(default_factory=dict)
    """Swept keys: for each a list of choices, or a mapping with `low`, `high`, and `log` or `step`."""
    trials: Positive | None = None
    """Trials of the search; None if the file gives no number."""
    confirm_each: str | None = None
    """A swept key with a list of choices, such as `method.rank`. All choices share the search, and each is confirmed
    with the setting that is predicted best for it."""


@dataclass(frozen=True, kw_only=True)
class SweepFile(Settings):
    """The content of a sweep file."""

    name: str = "sweep"
    description: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys and values: settings of every arm's runs, and of the sweep itself (`SweepConfig`)."""
    arms: Mapping[str, ArmConfig]

    def __post_init__(self) -> None:
        require_folder_name("`name`", self.name)
        if not 1 <= len(self.arms) <= MAX_ARMS:
            raise ConfigError(f"`arms` must have 1 to {MAX_ARMS} arms, but has {len(self.arms):,}.")


def find_sweep_file(name: str) -> Path:
    """Returns a sweep's file: a path, or a name in `sweeps/` of the current folder or among the packaged sweeps.

    Raises:
        ConfigError: The file is missing; the message lists the names.
    """
    files = list_sweep_files()
    if name in files:
        return files[name]
    if (Path(name) / SWEEP_FILE).is_file():
        raise ConfigError(
            f"a sweep must be a name or a file, but {name!r} is the folder of one. To resume it, or to add to it, type "
            f"`lorasweep sweep --resume {shlex.quote(name)}`."
        )
    path = Path(name)
    if path.is_file() and (path.suffix in (".yaml", ".yml") or "/" in name):
        return path
    raise ConfigError(
        f"a sweep must be one of {', '.join(sorted(files))} or a YAML file, but got {name!r}."
        f"{suggest_nearest(path.name, [*(other.name for other in path.parent.glob('*.y*ml')), *files])}"
        f"{f' Name data by `data.train={name}`.' if Path(name).is_file() else ''}"
    )


def list_sweep_files() -> dict[str, Path]:
    """Returns the files of all sweeps by name. A file in the current folder replaces a packaged file."""
    folders = (packaged_folder("sweeps"), Path.cwd() / "sweeps")
    return {path.stem: path for folder in folders for path in folder.rglob("*.yaml") if path.is_file()}


def read_content(source: Path | Mapping[str, Any]) -> Any:
    """Returns the content of a sweep file as nested mappings and lists, with interpolations resolved.

    Paths of files are absolute.

    Raises:
        ConfigError: The file is not YAML, or the content has values that YAML does not have.
    """
    try:
        loaded = OmegaConf.create(dict(source)) if isinstance(source, Mapping) else OmegaConf.load(source)
        content = OmegaConf.to_container(loaded, resolve=True)
        if not isinstance(content, dict):
            raise TypeError("it has no mapping with `arms`")
        json.dumps(content)  # the record keeps the content; YAML also has bytes and paths
        return make_paths_absolute(content)
    except Exception as error:  # PyYAML and OmegaConf raise errors of many classes
        reason = " ".join(str(error).split())
        name = "the content of a sweep" if isinstance(source, Mapping) else repr(str(source))
        raise ConfigError(f"{name} must be YAML, but can't be read: {reason}.") from error


def make_paths_absolute(value: Any, key: str = "") -> Any:
    """Returns nested settings with absolute paths of files, so that the sweep can be resumed from any folder."""
    if isinstance(value, Mapping):
        return {name: make_paths_absolute(item, str(name)) for name, item in value.items()}
    # a name without a dot or slash may be a split of a data set on the hub, such as `train`
    may_be_split = key.endswith(PATH_KEYS) and not (isinstance(value, str) and ("/" in value or "." in value))
    is_path = isinstance(value, str) and key.endswith(PATH_KEYS) and not may_be_split
    return os.path.abspath(value) if is_path and any(glob.iglob(value, recursive=True)) else value


@contextmanager
def name_in_errors(what: str) -> Iterator[None]:
    """Puts a name, such as that of an arm, before the message of any ConfigError that is raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error


def require_folder_name(what: str, name: str) -> None:
    """Raises ConfigError unless a name can be part of a folder's name."""
    if not re.fullmatch(rf"[\w-]{{1,{MAX_NAME_CHARACTERS}}}", name):
        raise ConfigError(
            f"{what} must consist of 1 to {MAX_NAME_CHARACTERS} letters, digits, `_` and `-`, but got {name!r}."
        )


def parse_range(key: str, value: Any, *, is_whole: bool) -> BaseDistribution:
    """Returns the distribution of a swept key: of a list of choices, or of `low`, `high`, and `log` or `step`.

    Raises:
        ConfigError: The range is empty or has the wrong form.
    """
    if isinstance(value, list | tuple):
        return _parse_choices(key, list(value))
    names = value.keys() if isinstance(value, Mapping) else set()
    log = value.get("log", False) if isinstance(value, Mapping) else None
    if not {"low", "high"} <= names <= set(RANGE_KEYS) or not isinstance(log, bool):
        raise ConfigError(
            f"the range of `{key}` must be a list of choices, or a mapping with `low`, `high`, and perhaps `log: true` "
            f"or `step`, but got {value!r}."
        )
    numbers = {name: number for name, number in value.items() if name != "log" and (name, number) != ("step", None)}
    for name, number in numbers.items():
        # Optuna computes the size of a range of whole numbers in 64 bits
        if not is_number(number) or (is_whole and (number != int(number) or abs(number) >= 2**62)):
            kind = "a whole number" if is_whole else "a number"
            raise ConfigError(f"the range of `{key}` must have {kind} as `{name}`, but got {number!r}.")
    arguments = {name: int(number) if is_whole else number for name, number in numbers.items()}
    try:
        with warnings.catch_warnings():
            # Optuna would lower `high` to the last step and warn. The user must write the values that are tried.
            warnings.simplefilter("error", UserWarning)
            return (IntDistribution if is_whole else FloatDistribution)(**arguments, log=log)
    except (ValueError, ArithmeticError, UserWarning) as error:  # Optuna's message names the broken rule
        raise ConfigError(
            f"the range of `{key}` must be one that Optuna accepts, but got {dict(value)!r}: {first_line(error)}."
        ) from error


def _parse_choices(key: str, choices: list[Any]) -> CategoricalDistribution:
    if len(choices) > MAX_CHOICES:
        raise ConfigError(
            f"the range of `{key}` must have at most {MAX_CHOICES:,} choices, but has {len(choices):,}. Write a range "
            "with `low` and `high`."
        )
    for choice in choices:
        plain = choice is None or isinstance(choice, bool | int | float | str)
        if not plain or (isinstance(choice, float) and not math.isfinite(choice)):
            raise ConfigError(f"a choice of `{key}` must be a number, a text, true, false or null, but got {choice!r}.")
    if not choices or len(set(map(repr, choices))) < len(choices):
        raise ConfigError(
            f"the range of `{key}` must have at least one choice, and no choice twice, but got {choices!r}."
        )
    return CategoricalDistribution(choices)


def list_corner_values(distribution: BaseDistribution) -> list[Any]:
    """Returns every choice of a list, or both ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def describe_space(space: Space) -> dict[str, Any]:
    """Returns a space in the form of a sweep file, for the sweep's record."""
    described: dict[str, Any] = {}
    for key, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            described[key] = list(distribution.choices)
        elif isinstance(distribution, FloatDistribution | IntDistribution):
            described[key] = {"low": distribution.low, "high": distribution.high, "log": distribution.log}
            if distribution.step != (1 if isinstance(distribution, IntDistribution) else None):
                described[key]["step"] = distribution.step
    return described
