"""Merges weight updates into the base's weights, and undoes it exactly, because the original weights are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from lorasweep.lora.fully_trained import trained_modules
from lorasweep.lora.inject import replace_module
from lorasweep.lora.layer_kinds import dequantised_weight, is_quantised
from lorasweep.lora.layers import LoraLayer, lora_layers

NARROW_DTYPES = (torch.bfloat16, torch.float16)
"""In these dtypes, rounding of activations changes outputs more than rounding of merged weights does."""


def merge_lora(model: nn.Module) -> None:
    """Gives the base of every LoRA layer the weight W0 + scaling · B A, rounded once; `unmerge_lora` undoes it.

    The original weight is kept beside it (as much memory again) and never written to, so tied weights and other models
    that share it are not affected. A merged layer doesn't train. `eval()` never merges.

    Raises:
        ValueError: The model has no LoRA layers, one is merged, or its base is quantised; nothing is then changed.
    """
    layers = require_lora_layers(model)
    check_merged(layers, merged=False)
    quantised = [name for name, layer in layers.items() if is_quantised(layer.base)]
    if quantised:
        raise ValueError(
            f"Layers must have floating-point weights to be merged, but {quantised[0]!r} is quantised. "
            "Call `remove_lora(model, merge=True)`, which dequantises them."
        )
    for layer in layers.values():
        original = layer.base.weight
        assert isinstance(original, nn.Parameter)
        layer.base.weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
        layer.unmerged_weight = (original,)


def unmerge_lora(model: nn.Module) -> None:
    """Gives every LoRA layer's base its original weight again, bit for bit.

    Raises:
        ValueError: The model has no LoRA layers, or one is not merged; nothing is then changed.
    """
    layers = require_lora_layers(model)
    check_merged(layers, merged=True)
    for layer in layers.values():
        (original,) = layer.unmerged_weight
        original.data = original.data.to(layer.weight.device)  # the model may have been moved since
        layer.base.weight, layer.unmerged_weight = original, ()


@contextmanager
def weights_in_fp32(model: nn.Module) -> Iterator[None]:
    """Holds the bf16 and fp16 weights and buffers of a model in fp32 while the context is open.

    The model then computes with their exact values, so that two models can be compared. In bf16 this is not possible:
    rounding of activations changes the logits several times more than rounding of merged weights, and it differs
    between processors. Meanwhile each bf16 or fp16 value takes 4 bytes more.
    """
    narrow = [
        (tensor, tensor.data) for tensor in chain(model.parameters(), model.buffers()) if tensor.dtype in NARROW_DTYPES
    ]
    try:
        for tensor, data in narrow:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data


def remove_lora(model: nn.Module, *, merge: bool) -> None:
    """Puts plain layers back in place, so that `model` has the modules and state dict of its base model again.

    Args:
        model: A model with LoRA layers.
        merge: Whether the plain layers get merged weights, and modules that trained in full replace the base's. A
            quantised layer is then dequantised. A merged weight is no longer tied to another module's: set
            `config.tie_word_embeddings=False` before saving with transformers, or the update is lost.

    Raises:
        ValueError: The model has no LoRA layers; or `merge` is False and biases trained, so that their original values
            are lost.
    """
    layers = require_lora_layers(model)
    if not merge and any(layer.config.bias != "none" for layer in layers.values()):
        raise ValueError(
            "`method.bias` must be none to restore the base, but biases trained. Load the base model again."
        )
    for layer in layers.values():
        replace_module(model, layer, _plain_layer(layer, merge=merge))
    for module in trained_modules(model).values():
        dtype = next((p.dtype for p in module.base.parameters()), None)
        replace_module(model, module, module.trained.to(dtype) if merge else module.base)
    model.requires_grad_(False)


def check_merged(layers: Mapping[str, LoraLayer], *, merged: bool) -> None:
    """Raises a ValueError unless every layer is merged (`merged=True`) or none is (`merged=False`)."""
    wrong = [name for name, layer in layers.items() if layer.merged is not merged]
    if wrong:
        must, got, call = ("be", "is not", "merge_lora") if merged else ("not be", "is", "unmerge_lora")
        raise ValueError(f"Every LoRA layer must {must} merged, but {wrong[0]!r} {got}. Call `{call}` first.")


def require_lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("`model` must have LoRA layers, but got none. Call `inject_lora` or `load_adapter` first.")
    return layers


def _plain_layer(layer: LoraLayer, *, merge: bool) -> nn.Module:
    if is_quantised(layer.base) and merge:
        weight = dequantised_weight(layer.base)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device=weight.device)
        plain.weight = nn.Parameter(weight + layer.weight_update())
        plain.register_parameter("bias", layer.base.bias)  # type: ignore[arg-type]
        return plain
    if layer.merged is not merge:
        weight = layer.merged_weight() if merge else layer.unmerged_weight[0]
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
    return layer.base
