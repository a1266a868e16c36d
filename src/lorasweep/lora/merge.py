"""Turns an adapted model into a plain model with the merged weights."""

from __future__ import annotations

import torch
from torch import nn

from lorasweep.lora.fully_trained import trained_modules
from lorasweep.lora.inject import replace_module
from lorasweep.lora.layer_kinds import dequantised_weight, is_quantised
from lorasweep.lora.layers import LoraLayer, lora_layers
from lorasweep.lora.recompute import restore_activations


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
        replace_module(model, layer, _build_merged_layer(layer))
    for module in trained_modules(model).values():
        dtype = next((parameter.dtype for parameter in module.base.parameters()), None)
        replace_module(model, module, module.trained.to(dtype))
    restore_activations(model)
    model.requires_grad_(False)


def require_lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("`model` must have LoRA layers, but got none. Call `inject_lora` or `load_adapter` first.")
    return layers


def _build_merged_layer(layer: LoraLayer) -> nn.Module:
    if not is_quantised(layer.base):
        layer.base.weight = nn.Parameter(layer.compute_merged_weight(), requires_grad=False)
        return layer.base
    with torch.no_grad():
        weight = dequantised_weight(layer.base)
        merged = weight + layer.compute_weight_update()
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device=weight.device)
    plain.weight = nn.Parameter(merged)
    plain.register_parameter("bias", layer.base.bias)  # type: ignore[arg-type]
    return plain
