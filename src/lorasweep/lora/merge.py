"""Merges the low-rank change into the base's weight, and unmerges it exactly: the original weight is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lorasweep.lora.inject import replace_module
from lorasweep.lora.layers import LoraLayer, lora_layers
from lorasweep.lora.quantised import dequantised_weight, is_quantised
from lorasweep.lora.trained import trained_modules

NARROW_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes whose rounding of activations is larger than the rounding of merged weights."""


def merge_lora(model: nn.Module) -> None:
    """Gives the base of every LoRA layer the weight W0 + scaling · B A, rounded once; `unmerge_lora` undoes it.

    The original weight is kept beside it (as much memory again) and never written to, so tied weights and other models
    that share it are not affected. A merged layer doesn't train. `eval()` never merges.

    Raises:
        ValueError: The model has no LoRA layers, one is merged, or its base is quantised; nothing is then changed.
    """
    layers = _layers_to_change(model, merged=False)
    quantised = [name for name, layer in layers.items() if is_quantised(layer.base)]
    if quantised:
        raise ValueError(
            f"The base must hold plain weights to be merged, but {quantised[0]!r} is quantised. "
            "Call `remove_lora(model, keep_change=True)`, which puts dequantised layers in place."
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
    for layer in _layers_to_change(model, merged=True).values():
        (original,) = layer.unmerged_weight
        original.data = original.data.to(layer.weight.device)  # the model may have been moved since
        layer.base.weight, layer.unmerged_weight = original, ()


@contextmanager
def weights_in_fp32(model: nn.Module) -> Iterator[None]:
    """Holds the bf16 and fp16 weights and buffers of a model in fp32, so that it computes with their exact values.

    Two models can then be compared by their weights. In bf16 this is not possible: rounding of activations changes the
    logits several times more than rounding of merged weights, and it differs between processors.

    Afterwards the model has its own tensors again. Meanwhile each such number takes 4 bytes more.
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


@torch.no_grad()
def merge_check(model: nn.Module, *args: Any, **kwargs: Any) -> float:
    """Returns the largest difference that merging makes to the logits of one batch, in evaluation mode.

    The model is unchanged afterwards. bf16 and fp16 weights and inputs are converted to fp32 (see `weights_in_fp32`),
    so that the difference comes from rounding the merged weights to the base's dtype, and not from the kernels.

    Args:
        model: A model with LoRA layers that are not merged.
        *args: Positional arguments of the model.
        **kwargs: Keyword arguments of the model.

    Returns:
        max |merged - unmerged| over the output, its `logits` or its first tensor.

    Raises:
        ValueError: The model can't be merged (see `merge_lora`).
    """
    training = {module: module.training for module in model.modules()}
    args, kwargs = tree_map(_widen, (args, kwargs))
    model.eval()
    try:
        with weights_in_fp32(model):
            separate = _logits(model(*args, **kwargs))
        merge_lora(model)  # outside `weights_in_fp32`, so that the merged weights are rounded to the base's dtype
        try:
            with weights_in_fp32(model):
                merged = _logits(model(*args, **kwargs))
        finally:
            unmerge_lora(model)
    finally:
        for module, mode in training.items():
            module.training = mode
    return float((merged.double() - separate.double()).abs().max())


def remove_lora(model: nn.Module, *, keep_change: bool) -> None:
    """Puts plain layers back in place, so that `model` has the modules and state dict of its base model again.

    With `keep_change` the layers hold merged weights, modules that trained in full replace the base's, and a quantised
    base is dequantised. A weight that was tied to another module's then is no longer tied: set
    `config.tie_word_embeddings=False` before saving with transformers, or the change is lost.

    Raises:
        ValueError: The model has no LoRA layers; or `keep_change` is False and biases were trained, so that their
            original values are lost.
    """
    layers = _require_layers(lora_layers(model))
    if not keep_change and any(layer.config.bias != "none" for layer in layers.values()):
        raise ValueError(
            "`method.bias` must be none to go back to the base, but biases trained. Load the base model again."
        )
    for layer in layers.values():
        replace_module(model, layer, _plain_layer(layer, keep_change=keep_change))
    for module in trained_modules(model).values():
        dtype = next((p.dtype for p in module.base.parameters()), None)
        replace_module(model, module, module.trained.to(dtype) if keep_change else module.base)
    model.requires_grad_(False)


def check_merged(layers: Mapping[str, LoraLayer], *, merged: bool) -> None:
    """Raises a ValueError unless every layer is merged (`merged=True`) or none is (`merged=False`)."""
    wrong = [name for name, layer in layers.items() if layer.merged is not merged]
    if wrong:
        must, got, call = ("be", "is not", "merge_lora") if merged else ("not be", "is", "unmerge_lora")
        raise ValueError(f"Every LoRA layer must {must} merged, but {wrong[0]!r} {got}. Call `{call}` first.")


def _layers_to_change(model: nn.Module, *, merged: bool) -> dict[str, LoraLayer]:
    layers = _require_layers(lora_layers(model))
    check_merged(layers, merged=merged)
    return layers


def _require_layers(layers: dict[str, LoraLayer]) -> dict[str, LoraLayer]:
    if not layers:
        raise ValueError("`model` must have LoRA layers, but got none. Call `inject_lora` or `load_adapter` first.")
    return layers


def _plain_layer(layer: LoraLayer, *, keep_change: bool) -> nn.Module:
    """Returns the base of a layer, with the change in its weight or without."""
    if is_quantised(layer.base) and keep_change:
        weight = dequantised_weight(layer.base)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device=weight.device)
        plain.weight = nn.Parameter(weight + layer.change())
        plain.register_parameter("bias", layer.base.bias)  # type: ignore[arg-type]
        return plain
    if layer.merged is not keep_change:
        weight = layer.merged_weight() if keep_change else layer.unmerged_weight[0]
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
    return layer.base


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW_DTYPES else value


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    first: Tensor = found if found is not None else output[0]
    return first
