"""Finds the folder of `model.path`: an embedded model, a local folder, or the hub's cache. Next: `load`."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]  # of its HTTP client

from lorasweep.config.model import ModelConfig
from lorasweep.errors import ConfigError, first_line

EMBEDDED = "embedded:"
HUB_TIMEOUT_S = 10.0
"""Seconds to wait for the hub before the cache is used: without a network the client's default takes far longer."""
SETTINGS_AND_TOKENIZER = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Patterns of the files of a model on the hub that are always downloaded."""


def find_files(config: ModelConfig) -> tuple[Path, str | None]:
    """Returns the folder of `model.path`, downloaded if necessary, and the name of the GGUF file to load or None.

    Raises:
        ConfigError: The model can't be found or downloaded, is an adapter, or has weights only in a pickle, which
            `model.allow_pickle` forbids.
    """
    found = find_folder(config) or _download(config)
    if found.is_file():
        return found.parent, found.name
    if config.factory is None:
        _check_weights(found, config)
    return found, config.gguf_file


def find_folder(config: ModelConfig) -> Path | None:
    """Returns the folder or GGUF file that `model.path` names, or None for a hub id.

    Raises:
        ConfigError: There is no such folder or embedded model, or `model.revision` is set for a local path.
    """
    path = config.path or ""
    if path.startswith(EMBEDDED):
        package = Path(str(importlib.resources.files("lorasweep.models")))
        names = sorted(file.parent.name for file in package.glob("*/config.json"))
        if path.removeprefix(EMBEDDED) not in names:
            raise ConfigError(f"`model.path` must name an embedded model ({', '.join(names)}), but got {path!r}.")
        return package / path.removeprefix(EMBEDDED)
    found = Path(path).expanduser()
    if found.is_dir() or (found.is_file() and found.suffix == ".gguf"):
        if config.revision is not None:
            raise ConfigError(f"`model.revision` must be null for a local {path!r}, but got {config.revision!r}.")
        return found
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or found.is_file():
        raise ConfigError(
            f"`model.path` must be a folder, a GGUF file or a hub id such as 'owner/name', but {path!r} is none of "
            "them. Check its spelling."
        )
    return None


def _download(config: ModelConfig) -> Path:
    """Returns the folder of a hub id in the cache, after downloading the files that are missing there.

    Raises:
        ConfigError: There is no such model, the user must first accept its terms, or the hub can't be reached and the
            cache lacks the model.
    """
    assert config.path is not None
    wanted = list(SETTINGS_AND_TOKENIZER)
    if config.factory is None:
        wanted += [config.gguf_file] if config.gguf_file else ["*.safetensors"]
        wanted += ["pytorch_model*.bin*"] if config.allow_pickle else []
    wanted += ["*.py"] if config.trust_remote_code else []
    try:
        folder = snapshot_download(
            config.path,
            revision=config.revision,
            allow_patterns=wanted,
            ignore_patterns=["*/*"],  # folders hold the model in other formats
            etag_timeout=HUB_TIMEOUT_S,
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"`model.path` must be a model that you may download, but {config.path!r} asks for consent to its terms. "
            "Accept them on its page, then log in with `hf auth login`."
        ) from error
    except (OSError, ValueError, HubError) as error:
        raise ConfigError(
            f"`model.path` must be a folder, or a model on the hub or in its cache, but {config.path!r} is not "
            f"({first_line(error)}). Check its spelling and the connection."
        ) from error
    return Path(folder)


def _check_weights(folder: Path, config: ModelConfig) -> None:
    """Raises ConfigError if a folder is an adapter, or has weights only in a pickle that is not allowed."""
    if (folder / "adapter_config.json").exists():  # transformers would load the base that it names, with the adapter
        raise ConfigError(
            f"`model.path` must be a whole model, but {config.path!r} is an adapter. Name its base, or merge it first "
            "(`lorasweep export`)."
        )
    if config.gguf_file is None and not config.allow_pickle and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"`model.path` must have weights in safetensors, but {config.path!r} has none. `model.allow_pickle=true` "
            "reads a pickle file instead, which can run code that is hidden in it: trust its maker."
        )
