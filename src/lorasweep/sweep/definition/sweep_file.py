"""Finds and reads a sweep file, and checks its keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic.dataclasses import dataclass

from lorasweep.config.build import Positive, Settings, build
from lorasweep.config.compose import packaged_folder
from lorasweep.config.method import flatten_alpha_over_rank
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest

MAX_NAME_CHARACTERS = 100
"""Maximum length of the name of a sweep or an arm. It becomes part of a folder's name, whose length is limited."""


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


def find_sweep_file(name: str) -> Path:
    """Returns a sweep's file: a path, or a name in `sweeps/` of the current folder or among the packaged sweeps.

    Raises:
        ConfigError: The file is missing; the message lists the names.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if not path.is_file():
            others = map(str, path.parent.glob("*.y*ml"))
            raise ConfigError(f"a sweep file must exist, but {name!r} does not.{nearest(name, others)}")
        return path
    files = list_sweep_files()
    if name not in files:
        raise ConfigError(
            f"a sweep must be one of {', '.join(sorted(files))} or a YAML file, but got {name!r}."
            f"{nearest(name, [*(path.name for path in Path.cwd().glob('*.y*ml')), *files])}"
            f"{f' Name data by `data.train={name}`.' if Path(name).is_file() else ''}"
        )
    return files[name]


def list_sweep_files() -> dict[str, Path]:
    """Returns the files of all sweeps by name. A file in the current folder replaces a packaged file."""
    folders = (packaged_folder("sweeps"), Path.cwd() / "sweeps")
    return {path.stem: path for folder in folders for path in folder.rglob("*.yaml") if path.is_file()}


def read_content(source: Path | Mapping[str, Any]) -> Any:
    """Returns the content of a sweep file as nested mappings and lists, with its interpolations resolved.

    Raises:
        ConfigError: The file is not YAML, or the content has values that YAML does not have.
    """
    try:
        loaded = OmegaConf.create(dict(source)) if isinstance(source, Mapping) else OmegaConf.load(source)
        content = OmegaConf.to_container(loaded, resolve=True)
        json.dumps(content)  # the record keeps the content; YAML also has bytes and paths
        return content
    except ConfigError:
        raise
    except Exception as error:  # PyYAML and OmegaConf raise errors of many classes
        reason = " ".join(str(error).split())
        name = "the content of a sweep" if isinstance(source, Mapping) else repr(str(source))
        raise ConfigError(f"{name} must be YAML, but can't be read: {reason}.") from error


def parse_file(content: Any) -> SweepFile:
    """Returns a sweep file from its content.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type.
    """
    arms = content.get("arms") if isinstance(content, Mapping) else None
    if not isinstance(arms, Mapping) or not arms:
        raise ConfigError("a sweep file must be a mapping with at least one arm in `arms`, but has no arm.")
    file = build(SweepFile, content)
    return replace(
        file,
        settings=flatten_alpha_over_rank(file.settings),
        arms={
            name: replace(arm, settings=flatten_alpha_over_rank(arm.settings), space=flatten_alpha_over_rank(arm.space))
            for name, arm in file.arms.items()
        },
    )


def require_folder_name(what: str, name: str) -> None:
    """Raises ConfigError unless a name can be part of a folder's name."""
    if not re.fullmatch(rf"[\w-]{{1,{MAX_NAME_CHARACTERS}}}", name):
        raise ConfigError(
            f"{what} must consist of 1 to {MAX_NAME_CHARACTERS} letters, digits, `_` and `-`, but got {name!r}."
        )
