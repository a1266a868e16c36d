"""Replaces the layers that a `LoraConfig` selects by LoRA layers, and LoRA layers by plain ones with merged weights."""

from __future__ import annotations

import torch
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.dropout import Dropout, DropoutMasks
from lorasweep.lora.fully_trained import copy_as_trainable, match_modules_to_save, trained_modules
from lorasweep.lora.layer_kinds import dequantised_weight, is_quantised
from lorasweep.lora.layers import AdaptedLayer, LoraLayer, lora_layers
from lorasweep.lora.targets import Coverage, find_targets


def inject_lora(
    model: nn.Module,
    config: LoraConfig,
    *,
    generator: torch.Generator | None = None,
) -> Coverage:
    """Adapts `model` in place: matched layers become LoRA layers, and all other parameters are frozen.

    Modules that `config.modules_to_save` names train too. The base's tensors keep their values, so several models that
    share them can be adapted.

    Each A is drawn, layer by layer, from the CPU stream `generator`, or torch's default stream; B is 0.

    Raises:
        ValueError: The model has LoRA layers already, or `config` does not fit it. The model is then unchanged.
    """
    check_not_injected(model)
    coverage = find_targets(model, config)
    layers = [LoraLayer(model.get_submodule(name), t, generator=generator) for name, t in coverage.targets.items()]
    modules = match_modules_to_save(model, config.modules_to_save)
    # all checks are done: nothing below can fail, so a refused model is unchanged
    freeze(model)
    for layer in layers:
        replace_module(model, layer.base, layer)
    for trained in copy_as_trainable(modules).values():
        replace_module(model, trained.base, trained)
    disable_encoder_fast_path(model)
    return coverage


def disable_encoder_fast_path(model: nn.Module) -> None:
    """Makes torch's encoder call its linear layers. Its fast path would use the base's weights without LoRA."""
    for module in model.modules():  # the fast path is not taken if these attributes have these values
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def replace_dropout(model: nn.Module, masks: DropoutMasks) -> None:
    """Replaces each `nn.Dropout` of a model by `lora.dropout.Dropout`. Functional dropout stays as it is."""
    for dropout in [module for module in model.modules() if type(module) is nn.Dropout]:
        replace_module(model, dropout, Dropout(dropout.p, masks))


def check_not_injected(model: nn.Module) -> None:
    """Raises a ValueError if the model has LoRA layers, packed or not."""
    names = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    if names:
        raise ValueError(
            f"`model` must have no LoRA layers yet, but {names[0]!r} is one. "
            "Load the base model again, or copy it before you inject."
        )


def freeze(model: nn.Module) -> None:
    """Freezes the trainable parameters. Other models may share frozen parameters, so these are not touched."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces `old` under all its names in `model`, so that a layer with two names stays one layer."""
    new.train(old.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:  # not `named_children`, which skips a layer's second name
                setattr(parent, name, new)


def merge_lora(model: nn.Module) -> None:
    """Replaces each LoRA layer by a plain layer with the weight W0 + scaling · B A, in place.

    The model then has the modules and state dict names of its base. Quantised layers are dequantised, and modules that
    trained in full keep their trained values. No tensor of the base changes, so tied weights and other models that
    share them are not affected. Merged weights are no longer tied: set `config.tie_word_embeddings=False` before you
    save with transformers, or the update is lost.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    for layer in require_lora_layers(model).values():
        if is_quantised(layer.base):
            with torch.no_grad():
                weight = dequantised_weight(layer.base)
                merged: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
                merged.weight = nn.Parameter(weight + layer.compute_weight_update())
            merged.bias = layer.base.bias
        else:
            merged = layer.base
            merged.weight = nn.Parameter(layer.compute_merged_weight(), requires_grad=False)
        replace_module(model, layer, merged)
    for module in trained_modules(model).values():
        dtype = next((parameter.dtype for parameter in module.base.parameters()), None)
        replace_module(model, module, module.trained.to(dtype))
    model.requires_grad_(False)


def require_lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("`model` must have LoRA layers, but got none. Call `inject_lora` first.")
    return layers
