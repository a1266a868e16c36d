"""A model of the user's own: calls `model.factory` and gives its model the interface of a loaded one."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasweep.config.model import ModelConfig
from lorasweep.config.user_function import call_user_function
from lorasweep.errors import ConfigError
from lorasweep.models.dropout import set_dropout_modules, set_dropout_settings
from lorasweep.models.pretrained import own_stream

KEY = "model.factory"


def build_own(
    config: ModelConfig, *, dtype: torch.dtype, offered: Mapping[str, Any]
) -> tuple[nn.Module, PreTrainedTokenizerBase | None, tuple[str, ...]]:
    """Returns the model of `model.factory` in `dtype`, its tokenizer if it returns one, and the names of new modules.

    The function may return the model, (model, tokenizer) or (model, tokenizer, names of modules that are not
    pre-trained). It draws the same numbers from torch's stream each time. A hook gives the model's output `logits`, as
    in transformers, if it is a tensor or a tuple that begins with one.

    Args:
        config: Names the function.
        dtype: Type of the parameters.
        offered: Values that the function may take as arguments of these names.

    Raises:
        ConfigError: There is no such function, it fails, or returns something else.
    """
    assert config.factory is not None
    with own_stream():
        made = call_user_function(config.factory, key=KEY, offered={"dtype": dtype, **offered})
    model, tokenizer, head = _unpack(made, config.factory)
    _set_dropout(model, config)
    _cast(model, dtype)
    model.register_forward_hook(_with_logits)
    return model, tokenizer, head


def _unpack(made: Any, name: str) -> tuple[nn.Module, PreTrainedTokenizerBase | None, tuple[str, ...]]:
    parts = made if isinstance(made, tuple) else (made,)
    model, tokenizer, head = (*parts, None, ())[:3] if len(parts) < 3 else parts[:3]
    fits = len(parts) <= 3 and isinstance(model, nn.Module)
    if not fits or not (tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase)):
        got = ", ".join(type(part).__name__ for part in parts)
        raise ConfigError(
            f"`{KEY}` must return an nn.Module, (model, tokenizer) or (model, tokenizer, names of new modules) with a "
            f"tokenizer of transformers, but {name!r} returns {got}. Change what it returns."
        )
    names = tuple(head)
    known = {own for own, _ in model.named_modules() if own}
    if unknown := [one for one in names if one not in known]:
        raise ConfigError(
            f"`{KEY}` must return names of modules of its model, but {name!r} returns {unknown[0]!r}. "
            "Name them as `model.named_modules()` does."
        )
    return model, tokenizer, names


def _set_dropout(model: nn.Module, config: ModelConfig) -> None:
    if config.dropout is None:
        return
    if hasattr(model, "config"):
        set_dropout_settings(model.config, config.dropout)
    if not set_dropout_modules(model, config.dropout) and config.dropout:
        raise ConfigError(
            f"`model.dropout` must be null or 0 for a model without dropout modules, but got {config.dropout!r}, "
            "which has no effect there."
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts all floating values; in a model of transformers only parameters, since rotary frequencies stay in fp32."""
    if not isinstance(model, PreTrainedModel):
        model.to(dtype)
        return
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _with_logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) and output and not hasattr(output, "logits") else output
    return SimpleNamespace(logits=first) if isinstance(first, Tensor) else output
