"""What the files of sentence-transformers say on a model's embeddings, and the pooling of hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorasweep.errors import ConfigError
from lorasweep.tasks.embeddings.settings import Pooling

ENDINGS = ("_tokens", "_token", "token")
"""Endings of a pooling's name in the files of sentence-transformers, such as `pooling_mode_cls_token`."""


class EmbedderFiles(NamedTuple):
    """What the files of sentence-transformers say on a model."""

    found_pooling: Pooling
    is_cosine: bool
    """Whether embeddings are compared by cosines, not by dot products."""


def read_embedder_files(folder: Path) -> EmbedderFiles | None:
    """Returns what a model's files of sentence-transformers say; None without such files.

    Raises ConfigError if the model has modules, a pooling or a similarity that are not supported.
    """
    if not (folder / "modules.json").is_file():
        return None
    found: list[str] = []
    modules = {one["type"].rpartition(".")[2]: one for one in json.loads((folder / "modules.json").read_text("utf-8"))}
    if "Pooling" in modules:
        settings = json.loads((folder / modules["Pooling"]["path"] / "config.json").read_text("utf-8"))
        earlier = [key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True]
        named = settings.get("pooling_mode", [name for name in earlier if name != "include_prompt"])
        for name in [named] if isinstance(named, str) else named:
            found.append(next((name.removesuffix(end) for end in ENDINGS if name.endswith(end)), name))
        found += [] if settings.get("include_prompt", True) else ["without prompts"]
    if modules.keys() - {"Transformer", "Pooling", "Normalize"} or len(found) != 1 or found[0] not in get_args(Pooling):
        raise ConfigError(
            f"`model.path` must have the modules Transformer, Pooling and perhaps Normalize, with one pooling of "
            f"{', '.join(get_args(Pooling))}, but {str(folder)!r} has {', '.join(modules)} and the pooling "
            f"{', '.join(found) or 'none'}. Use another model."
        )
    settings_file = folder / "config_sentence_transformers.json"
    given = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
    if (similarity := given.get("similarity_fn_name") or "cosine") not in ("cosine", "dot"):
        raise ConfigError(
            f"`model.path` must compare embeddings by cosine or dot, but `similarity_fn_name` of {str(folder)!r} is "
            f"{similarity!r}. Use another model."
        )
    pooling = next(name for name in get_args(Pooling) if name == found[0])
    # after Normalize every vector has length 1, so that both are equal
    return EmbedderFiles(found_pooling=pooling, is_cosine=similarity == "cosine" or "Normalize" in modules)


def pool(
    hidden: Float[Tensor, "rows length size"], mask: Int[Tensor, "rows length"] | None, pooling: Pooling
) -> Float[Tensor, "rows size"]:
    """Returns a vector for each row. Rows are padded on the right; without a mask nothing is padded."""
    if pooling == "cls":
        return hidden[:, 0]
    mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device) if mask is None else mask
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    if pooling == "max":
        return hidden.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1)
    return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
