"""Builds the user's model with `model.factory`. Its output gets `logits`, as in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasweep.config.components import call_user_function
from lorasweep.config.model import ModelConfig
from lorasweep.errors import ConfigError
from lorasweep.models.dropout import set_dropout_modules, set_dropout_settings


def build_custom_model(
    config: ModelConfig, *, dtype: torch.dtype, offered: Mapping[str, Any]
) -> tuple[nn.Module, PreTrainedTokenizerBase | None, tuple[str, ...]]:
    """Returns the model in `dtype`, its tokenizer or None, and the names of its new modules (not pre-trained).

    The user's function may return the model, (model, tokenizer), or (model, tokenizer, names of new modules). It runs
    with a fixed torch seed. If the model returns a tensor, or a tuple that begins with a tensor, a hook replaces this
    output with an object that has `logits`.

    Args:
        config: Settings of the model; `factory` names the function.
        dtype: Type of the parameters.
        offered: Values that are passed to the function if it has parameters of these names.

    Raises:
        ConfigError: The function does not exist, fails, or returns other types.
    """
    assert config.factory is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same weights at each call, whatever the seed of the run
        result = call_user_function(config.factory, key="model.factory", offered={"dtype": dtype, **offered})
    model, tokenizer, new_names = _unpack(result, config.factory)
    _set_dropout(model, config)
    _cast(model, dtype)
    model.register_forward_hook(_with_logits)
    return model, tokenizer, new_names


def _unpack(result: Any, name: str) -> tuple[nn.Module, PreTrainedTokenizerBase | None, tuple[str, ...]]:
    parts = result if isinstance(result, tuple) else (result,)
    model, tokenizer, new_names = (*parts, None, ())[:3] if len(parts) < 3 else parts[:3]
    has_model = len(parts) <= 3 and isinstance(model, nn.Module)
    if not has_model or not (tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase)):
        got = ", ".join(type(part).__name__ for part in parts)
        raise ConfigError(
            "`model.factory` must return an nn.Module, (model, tokenizer) or (model, tokenizer, names of new modules) "
            f"with a tokenizer of transformers, but {name!r} returns {got}."
        )
    if isinstance(model, LightningModule) and type(model).training_step is not LightningModule.training_step:
        raise ConfigError(
            f"`model.factory` must return the network, but {name!r} returns a LightningModule with its own "
            f"`training_step`, which would never be called. Set `module._target_` instead (docs/own_module.md)."
        )
    module_names = {module_name for module_name, _ in model.named_modules() if module_name}
    if unknown := [module_name for module_name in new_names if module_name not in module_names]:
        raise ConfigError(
            f"`model.factory` must return names of modules of its model, but {name!r} returns {unknown[0]!r}. "
            "Use names from `model.named_modules()`."
        )
    return model, tokenizer, tuple(new_names)


def _set_dropout(model: nn.Module, config: ModelConfig) -> None:
    if config.dropout is None:
        return
    if hasattr(model, "config"):
        set_dropout_settings(model.config, config.dropout)
    if not set_dropout_modules(model, config.dropout) and config.dropout:
        raise ConfigError(
            f"`model.dropout` must be null or 0 for a model without dropout modules, but got {config.dropout!r}."
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    if not isinstance(model, PreTrainedModel):
        model.to(dtype)
        return
    # `model.to` would also convert buffers, but transformers needs its rotary frequencies in fp32.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _with_logits(module: nn.Module, inputs: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) and output and not hasattr(output, "logits") else output
    return SimpleNamespace(logits=first) if isinstance(first, Tensor) else output
