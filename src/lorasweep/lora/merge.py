"""Merges weight updates into the base's weights and restores the original weights, which are kept in memory."""

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
from lorasweep.lora.recompute import restore_activations

HALF_PRECISION_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes that `weights_in_fp32` converts to fp32."""


def merge_lora(model: nn.Module) -> None:
    """Replaces the base weight of every LoRA layer by W0 + scaling · B A, until `unmerge_lora` restores it.

    The original weight stays in memory, which takes as much memory again. No value of it changes, so tied weights and
    other models that share the weight are not affected. A merged layer does not train. `eval()` never merges.

    Raises:
        ValueError: The model has no LoRA layers, or one of them is merged or has a quantised base. The model is then
            unchanged.
    """
    layers = require_lora_layers(model)
    check_merged(layers, merged=False)
    quantised = [name for name, layer in layers.items() if is_quantised(layer.base)]
    if quantised:
        raise ValueError(
            f"Layers must have floating-point weights to be merged, but {quantised[0]!r} is quantised. "
            "Call `remove_lora(model, merge=True)`, which dequantises these layers."
        )
    for layer in layers.values():
        original = layer.base.weight
        assert isinstance(original, nn.Parameter)
        layer.base.weight = nn.Parameter(layer.compute_merged_weight(), requires_grad=False)
        layer.unmerged_weight = (original,)


def unmerge_lora(model: nn.Module) -> None:
    """Restores the original base weight of every LoRA layer, bit for bit.

    Raises:
        ValueError: The model has no LoRA layers, or one of them is not merged. The model is then unchanged.
    """
    layers = require_lora_layers(model)
    check_merged(layers, merged=True)
    for layer in layers.values():
        (original,) = layer.unmerged_weight
        original.data = original.data.to(layer.weight.device)  # the model may have been moved since
        layer.base.weight, layer.unmerged_weight = original, ()


@contextmanager
def weights_in_fp32(model: nn.Module) -> Iterator[None]:
    """Converts the bf16 and fp16 weights and buffers of a model to fp32 while the context is open.

    The logits of two models can then be compared. In bf16 they can't: rounding of activations changes logits several
    times more than rounding of merged weights does, and it differs between processors. In the context, each converted
    value takes 4 more bytes.
    """
    # the original data is kept, so that the model gets back the same memory, which other models may share
    originals = [
        (tensor, tensor.data)
        for tensor in chain(model.parameters(), model.buffers())
        if tensor.dtype in HALF_PRECISION_DTYPES
    ]
    try:
        for tensor, data in originals:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data


def remove_lora(model: nn.Module, *, merge: bool) -> None:
    """Replaces LoRA layers by plain layers, so that `model` has the modules and state dict names of its base model.

    Args:
        model: A model with LoRA layers.
        merge: If True, the plain layers have merged weights, quantised layers are dequantised, and modules that trained
            in full keep their trained values. If False, the base model is restored. Merged weights are no longer
            tied: set `config.tie_word_embeddings=False` before you save with transformers, or the update is lost.

    Raises:
        ValueError: The model has no LoRA layers; or `merge` is False and biases trained, whose original values are no
            longer known.
    """
    layers = require_lora_layers(model)
    if not merge and any(layer.config.bias != "none" for layer in layers.values()):
        raise ValueError(
            "`method.bias` must be 'none' to restore the base model, but biases have trained. "
            "Load the base model again."
        )
    for layer in layers.values():
        replace_module(model, layer, _build_plain_layer(layer, merge=merge))
    for module in trained_modules(model).values():
        dtype = next((p.dtype for p in module.base.parameters()), None)
        replace_module(model, module, module.trained.to(dtype) if merge else module.base)
    restore_activations(model)
    model.requires_grad_(False)


def check_merged(layers: Mapping[str, LoraLayer], *, merged: bool) -> None:
    """Raises a ValueError unless all layers are merged (`merged=True`) or no layer is merged (`merged=False`)."""
    wrong = [name for name, layer in layers.items() if layer.is_merged is not merged]
    if wrong:
        must, got, call = ("be", "is not", "merge_lora") if merged else ("not be", "is", "unmerge_lora")
        raise ValueError(f"Every LoRA layer must {must} merged, but {wrong[0]!r} {got}. Call `{call}` first.")


def require_lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("`model` must have LoRA layers, but got none. Call `inject_lora` or `load_adapter` first.")
    return layers


def _build_plain_layer(layer: LoraLayer, *, merge: bool) -> nn.Module:
    if is_quantised(layer.base) and merge:
        weight = dequantised_weight(layer.base)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device=weight.device)
        plain.weight = nn.Parameter(weight + layer.compute_weight_update())
        plain.register_parameter("bias", layer.base.bias)  # type: ignore[arg-type]
        return plain
    # the base has the wrong weight if its merged state differs from the requested one
    if layer.is_merged is not merge:
        weight = layer.compute_merged_weight() if merge else layer.unmerged_weight[0]
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
    return layer.base
