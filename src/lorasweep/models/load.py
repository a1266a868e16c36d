"""Loads the base model, frozen, with its tokenizer. `methods` then says what of a copy of it trains.

Weights are read from safetensors only, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.errors import HTTPError as HubError  # type: ignore[attr-defined]  # whichever its client raises
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorasweep.config.run import ModelConfig
from lorasweep.errors import ConfigError
from lorasweep.models.pretrained import LOADING_ERRORS, first_line, load_pretrained, quiet_transformers

EMBEDDED = "embedded:"
HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A pre-trained model whose weights stay as they are; runs train copies that share them."""

    model: PreTrainedModel
    """In evaluation mode, no parameter trains, no key-value cache. Called as `model(input_ids=...).logits`."""
    tokenizer: PreTrainedTokenizerBase
    path: str
    """`model.path` as it was set."""
    fingerprint: str
    """Of the weights as loaded, so it differs between dtypes (see `fingerprint_weights`)."""
    num_parameters: int
    """A tensor used twice counts once."""


def load_base(config: ModelConfig, *, dtype: torch.dtype) -> BaseModel:
    """Loads the base model straight into `dtype`, on the CPU.

    Buffers that transformers keeps in fp32 (rotary frequencies) stay so. From the hub's cache nothing is asked for on
    the network.

    Raises:
        ConfigError: `model.path` is not there, damaged, incomplete or no causal language model in safetensors.
    """
    model, tokenizer = _load_anywhere(config, dtype=dtype)
    model.requires_grad_(False).train(False)
    model.config.use_cache = False
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        path=config.path,
        fingerprint=fingerprint_weights(model),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def fingerprint_weights(model: nn.Module) -> str:
    """Returns the first 16 hex digits of a SHA-256 over the sorted names and raw bytes of all parameters.

    Tied weights count once, under their first name.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _load_anywhere(config: ModelConfig, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = find_folder(config)
    if folder is not None:
        return _load(str(folder), config, dtype=dtype)
    cached = _find_in_cache(config)
    if cached is not None:
        return _load(str(cached), config, dtype=dtype)
    _ask_hub(config)
    return _load(config.path, config, dtype=dtype)


def find_folder(config: ModelConfig) -> Path | None:
    """Returns the folder that `model.path` means, or None for a hub id.

    Raises:
        ConfigError: There is no such folder or embedded model, or a revision is set for one.
    """
    path = config.path
    if path.startswith(EMBEDDED):
        folder = _embedded_folder(path.removeprefix(EMBEDDED))
    else:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            if path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path or folder.is_file():
                raise ConfigError(
                    f"`model.path` must be a folder or a hub id such as 'owner/name', but there is no folder {path!r}. "
                    "Check its spelling."
                )
            return None
    if config.revision is not None:
        raise ConfigError(
            f"`model.revision` must be null unless `model.path` is a hub id, but got {config.revision!r} "
            f"with {path!r}, where it has no effect."
        )
    return folder


def _embedded_folder(name: str) -> Path:
    package = Path(str(importlib.resources.files("lorasweep.models")))
    names = sorted(file.parent.name for file in package.glob("*/config.json"))
    if name not in names:
        raise ConfigError(
            f"`model.path` must name an embedded model ({', '.join(names)}), but got {EMBEDDED + name!r}."
        )
    return package / name


def _load(source: str, config: ModelConfig, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    revision = config.revision or "main"
    attention: dict[str, Any] = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    try:
        model = load_pretrained(AutoModelForCausalLM, source, dtype=dtype, revision=revision, **attention)
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ConfigError(
            "`model.path` must be a causal language model in safetensors with its tokenizer, but "
            f"{config.path!r} can't be loaded: {first_line(error)}. Get the model again, or use another."
        ) from error
    return model, tokenizer


def _find_in_cache(config: ModelConfig) -> Path | None:
    """Returns the folder of a model in the hub's cache, or None where it is not there as a whole."""
    try:
        found = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    except HFValidationError:
        return None  # not a hub id; asking the hub says why
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _ask_hub(config: ModelConfig) -> None:
    """Asks once whether the hub has the model: transformers itself would try for half a minute without a network.

    Raises:
        ConfigError: The hub can't be reached, or has no such model or revision.
    """
    try:
        HfApi().model_info(config.path, revision=config.revision, timeout=HUB_TIMEOUT_S)
    except (OSError, ValueError, HubError) as error:
        raise ConfigError(
            f"`model.path` must be a folder or a model that is in the hub's cache or on the hub, but {config.path!r} "
            f"is not ({first_line(error)}). Check its spelling and the connection, or name a local folder."
        ) from error
