"""Finds the folder of `model.path`: an embedded model, a local folder, or a download from the hub."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]  # lacks a type stub

from lorasweep.config.model import ModelConfig
from lorasweep.errors import ConfigError, first_line

EMBEDDED_PREFIX = "embedded:"
HUB_TIMEOUT_S = 10.0
"""Seconds to wait for the hub's answer before its cache is used. The client's default is far longer."""
ALWAYS_DOWNLOADED = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
"""Patterns for the names of files that are always downloaded: configuration, tokenizer and weights."""


def find_model_folder(config: ModelConfig) -> Path:
    """Returns the folder of `model.path`. Downloads missing files.

    Raises ConfigError if there is no such model, or it is only an adapter, or has no weights in safetensors.
    """
    path = find_local_path(config) or _download(config)
    _check_weights(path, config)
    return path


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
    if local.is_dir():
        if config.revision is not None:
            raise ConfigError(f"`model.revision` must be null for the folder {path!r}, but got {config.revision!r}.")
        return local
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or local.is_file():
        raise ConfigError(
            f"`model.path` must be a folder or a hub id such as 'owner/name', but got {path!r}. Check its spelling."
        )
    return None


def _download(config: ModelConfig) -> Path:
    """Returns the folder of a hub id in the hub's cache. Downloads the files that the cache does not have."""
    wanted = [*ALWAYS_DOWNLOADED, *(["*.py"] if config.trust_remote_code else [])]
    try:
        folder = snapshot_download(
            config.path,
            revision=config.revision,
            allow_patterns=wanted,
            ignore_patterns=["*/*"],  # subfolders have the model in other formats
            etag_timeout=HUB_TIMEOUT_S,
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"`model.path` must be a model that you may download, but you did not accept the terms of {config.path!r}. "
            "Accept them on its page, then log in with `hf auth login`."
        ) from error
    except (OSError, ValueError, HubError) as error:
        raise ConfigError(
            f"`model.path` must be a folder or a model on the hub, but {config.path!r} can't be downloaded: "
            f"{first_line(error.__cause__ or error)}. Check its spelling and the connection."
        ) from error
    return Path(folder)


def _check_weights(folder: Path, config: ModelConfig) -> None:
    if (folder / "adapter_config.json").exists():  # transformers would load its base model, too
        raise ConfigError(
            f"`model.path` must be a whole model, but {config.path!r} is an adapter. Use its base model, or merge "
            "the adapter first (`lorasweep export`)."
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"`model.path` must have weights in safetensors, but {config.path!r} has none. Save the model again with "
            "transformers' `save_pretrained`."
        )
