"""From `model.path` to a folder on disk: a folder, the embedded model, the hub's cache, or the hub. Next: `load`.

What is in a folder or in the cache is used without asking the network.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError
from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]  # whichever its client raises

from lorasweep.config.model import ModelConfig
from lorasweep.errors import ConfigError, first_line

EMBEDDED = "embedded:"
HUB_TIMEOUT_S = 10.0
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where a model's files are, and which of them hold the weights."""

    folder: Path
    form: Literal["safetensors", "pickle", "gguf"]
    gguf_file: str | None = None
    """Name in the folder of the file that is both weights and settings."""


def find_files(config: ModelConfig) -> ModelFiles:
    """Returns where the files of `model.path` are, downloading them where they are not on this machine.

    Raises:
        ConfigError: They can't be had, only as a pickle that `model.allow_pickle` does not allow, or are an adapter.
    """
    folder, gguf_file = find_source(config), config.gguf_file
    if folder.is_file():
        folder, gguf_file = folder.parent, folder.name
    names = [file.name for file in folder.iterdir()]
    if "adapter_config.json" in names:  # transformers would load the base that it names, and the adapter into it
        raise ConfigError(
            f"`model.path` must be a whole model, but {config.path!r} is an adapter. Name its base, or merge it first "
            "(`lorasweep export`)."
        )
    return ModelFiles(folder=folder, form=_choose_form(names, config, gguf_file=gguf_file), gguf_file=gguf_file)


def find_source(config: ModelConfig) -> Path:
    """Returns the folder or GGUF file of `model.path`, downloading it where it is not on this machine.

    With `model.factory` it is a tokenizer's: no weights are looked for.

    Raises:
        ConfigError: It can't be had.
    """
    return find_folder(config) or find_in_cache(config) or download(config)


def find_folder(config: ModelConfig) -> Path | None:
    """Returns the folder or GGUF file that `model.path` means, or None for a hub id.

    Raises:
        ConfigError: There is no such folder or embedded model, or a setting has no effect for one.
    """
    path = config.path or ""
    if path.startswith(EMBEDDED):
        found = _embedded_folder(path.removeprefix(EMBEDDED))
    else:
        found = Path(path).expanduser()
        if found.is_file() and found.suffix == ".gguf":
            _require_null("gguf_file", config.gguf_file, path, because="`model.path` is a GGUF file itself")
        elif not found.is_dir():
            if path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path or found.is_file():
                raise ConfigError(
                    "`model.path` must be a folder, a GGUF file or a hub id such as 'owner/name', but there is no "
                    f"folder {path!r}. Check its spelling."
                )
            return None
    _require_null("revision", config.revision, path, because="`model.path` is a hub id")
    return found


def find_in_cache(config: ModelConfig) -> Path | None:
    """Returns the folder of a model in the hub's cache, or None where it is not there as a whole."""
    assert config.path is not None
    first = "tokenizer_config.json" if config.factory else config.gguf_file or "config.json"
    try:
        found = try_to_load_from_cache(config.path, first, revision=config.revision)
    except HFValidationError:
        return None  # not a hub id; asking the hub says why
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and _is_whole(folder, config) else None


def download(config: ModelConfig) -> Path:
    """Downloads what is needed of a model into the hub's cache, and returns its folder.

    The hub is asked once whether it has the model: transformers itself would try for half a minute without a network.

    Raises:
        ConfigError: The hub can't be reached, or has no such model or revision, or only a pickle of it.
    """
    assert config.path is not None
    try:
        listed = HfApi().model_info(config.path, revision=config.revision, timeout=HUB_TIMEOUT_S).siblings or ()
        names = [file.rfilename for file in listed if "/" not in file.rfilename]  # folders hold other formats
        wanted = _choose_wanted(names, config)
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=wanted))
    except ConfigError:
        raise
    except GatedRepoError as error:
        raise ConfigError(
            f"`model.path` must be a model that you may download, but {config.path!r} asks for consent to its terms. "
            "Accept them on its page, then log in with `hf auth login`."
        ) from error
    except (OSError, ValueError, HubError) as error:
        raise ConfigError(
            f"`model.path` must be a folder or a model that is in the hub's cache or on the hub, but {config.path!r} "
            f"is not ({first_line(error)}). Check its spelling and the connection, or name a local folder."
        ) from error


def _choose_wanted(names: Collection[str], config: ModelConfig) -> list[str]:
    """The files of a hub's repository that loading reads."""
    endings = (".json", ".txt", ".model", ".jinja", *([".py"] if config.trust_remote_code else []))
    if config.factory is not None:
        return [name for name in names if name.endswith(endings)]
    form = _choose_form(names, config, gguf_file=config.gguf_file)
    weights = {"safetensors": (".safetensors",), "pickle": (".bin",), "gguf": (config.gguf_file or ".gguf",)}[form]
    return [name for name in names if name.endswith((*endings, *weights))]


def _choose_form(
    names: Collection[str], config: ModelConfig, *, gguf_file: str | None
) -> Literal["safetensors", "pickle", "gguf"]:
    """Which files to read the weights from.

    Raises:
        ConfigError: The GGUF file is not there, or there is only a pickle and it is not allowed.
    """
    if gguf_file is not None:
        if gguf_file not in names:
            others = sorted(name for name in names if name.endswith(".gguf"))
            raise ConfigError(
                f"`model.gguf_file` must be a file of {config.path!r}, but got {gguf_file!r}. "
                f"Its GGUF files: {', '.join(others) or 'none'}."
            )
        return "gguf"
    pickles = [name for name in names if name in PICKLES]
    if not pickles or any(name in SAFETENSORS for name in names):
        return "safetensors"
    if not config.allow_pickle:
        raise ConfigError(
            f"`model.allow_pickle` must be true for weights in a pickle file, but is false and {config.path!r} has "
            f"only {pickles[0]!r}. Reading a pickle can run code that is hidden in it: find the model in safetensors, "
            "or set it for a file whose maker you trust."
        )
    return "pickle"


def _is_whole(folder: Path, config: ModelConfig) -> bool:
    """Whether a folder of the cache has everything: a download may have been cut off."""
    if config.gguf_file is not None:
        return (folder / config.gguf_file).exists()
    has_tokenizer = any((folder / name).exists() for name in TOKENIZERS)
    if config.factory is not None:
        return has_tokenizer
    indices = [*SAFETENSORS, *(PICKLES if config.allow_pickle else ())]
    first = next((folder / name for name in indices if (folder / name).exists()), None)
    if first is None or not has_tokenizer:
        return False
    if first.suffix != ".json":
        return True
    shards = json.loads(first.read_text())["weight_map"].values()
    return all((folder / name).exists() for name in set(shards))


def _require_null(key: str, value: str | None, path: str, *, because: str) -> None:
    if value is not None:
        unless = f"unless {because}" if key == "revision" else f"where {because}"
        raise ConfigError(
            f"`model.{key}` must be null {unless}, but got {value!r} with {path!r}, where it has no effect."
        )


def _embedded_folder(name: str) -> Path:
    package = Path(str(importlib.resources.files("lorasweep.models")))
    names = sorted(file.parent.name for file in package.glob("*/config.json"))
    if name not in names:
        raise ConfigError(
            f"`model.path` must name an embedded model ({', '.join(names)}), but got {EMBEDDED + name!r}."
        )
    return package / name
