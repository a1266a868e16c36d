"""Finds the folder of a base model. Imports no torch, so that a wrong path is refused at once."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from lorasweep.config.run import ModelConfig
from lorasweep.errors import ConfigError

EMBEDDED_PREFIX = "embedded:"


def find_local_path(config: ModelConfig) -> Path | None:
    """Returns the folder that `model.path` names, or None for a hub id. Raises ConfigError if it does not exist."""
    path = config.path
    if path.startswith(EMBEDDED_PREFIX):
        package = Path(str(importlib.resources.files("lorasweep.models")))
        names = sorted(file.parent.name for file in package.glob("*/config.json"))
        if path.removeprefix(EMBEDDED_PREFIX) not in names:
            raise ConfigError(f"`model.path` must name an embedded model ({', '.join(names)}), but got {path!r}.")
        return package / path.removeprefix(EMBEDDED_PREFIX)
    local = Path(path).expanduser()
    if path and local.is_dir():
        if config.revision is not None:
            raise ConfigError(f"`model.revision` must be null for the folder {path!r}, but got {config.revision!r}.")
        return local
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or local.is_file() or not path:
        raise ConfigError(
            f"`model.path` must be a folder or a hub id such as 'owner/name', but {path!r} is "
            f"{'a file' if local.is_file() else 'no folder that exists'}. Check its spelling."
        )
    return None
