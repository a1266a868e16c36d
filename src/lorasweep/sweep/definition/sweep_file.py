"""Finds and reads a sweep file, and checks its keys."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic.dataclasses import dataclass

from lorasweep.config.build import Positive, Settings
from lorasweep.config.compose import packaged_folder
from lorasweep.config.sweep import MAX_ARMS
from lorasweep.errors import ConfigError
from lorasweep.record import SWEEP_FILE
from lorasweep.sweep.definition.ranges import Range
from lorasweep.wording import suggest_nearest

MAX_NAME_CHARACTERS = 100
"""Maximum length of the name of a sweep or an arm. It becomes part of a folder's name, whose length is limited."""

PATH_KEYS = ("data.train", "data.validation", "data.test", "model.path")
"""Settings whose values may be paths of files."""


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

    @property
    def layer(self) -> dict[str, Any]:
        """The arm's values and ranges, by dotted key. Raises ConfigError if a range is wrong."""
        return {**self.settings, **{key: Range.parse(key, range_) for key, range_ in self.space.items()}}


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


def list_sweep_files() -> dict[str, Path]:
    """Returns the sweeps that have names: the packaged ones, and those in `sweeps/` of the current folder."""
    folders = (packaged_folder("sweeps"), Path.cwd() / "sweeps")  # a file of the second replaces one of the first
    return {path.stem: path for folder in folders for path in folder.rglob("*.yaml") if path.is_file()}


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
    near = suggest_nearest(path.name, [*(other.name for other in path.parent.glob("*.y*ml")), *files])
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"the file of a sweep must exist, but {name!r} does not.{near}")
    raise ConfigError(
        f"a sweep must be one of {', '.join(sorted(files))} or a YAML file, but got {name!r}.{near}"
        f"{f' Name data by `data.train={name}`.' if Path(name).is_file() else ''}"
    )


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
        raise ConfigError(f"{what}: {error}", key=error.key) from error


def require_folder_name(what: str, name: str) -> None:
    """Raises ConfigError unless a name can be part of a folder's name."""
    if not re.fullmatch(rf"[\w-]{{1,{MAX_NAME_CHARACTERS}}}", name):
        raise ConfigError(
            f"{what} must consist of 1 to {MAX_NAME_CHARACTERS} letters, digits, `_` and `-`, but got {name!r}."
        )
