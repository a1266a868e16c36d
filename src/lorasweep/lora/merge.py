"""The change written into the base's weight and taken out again, without drift: the original weight is kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorasweep.lora.layers import LoraLinear, lora_layers


def merge_lora(model: nn.Module) -> None:
    """Makes every LoRA layer a plain one for now: its base gets the weight W0 + scaling · B A.

    The original weight is kept beside it (that much more memory) and never written to, so tied weights and other models
    that share it are not affected. A merged layer doesn't train. `eval()` never merges.

    Raises:
        ValueError: The model has no LoRA layers, or one is merged already; nothing is then changed.
    """
    for layer in _layers_to_change(model, merged=False):
        merged = nn.Parameter(merged_weight(layer), requires_grad=False)
        layer.base.weight, layer.unmerged_weight = merged, (layer.base.weight,)


def unmerge_lora(model: nn.Module) -> None:
    """Takes the change out of every LoRA layer's base again: the very tensor that was there before, bit for bit.

    Raises:
        ValueError: The model has no LoRA layers, or one is not merged; nothing is then changed.
    """
    for layer in _layers_to_change(model, merged=True):
        (original,) = layer.unmerged_weight
        original.data = original.data.to(layer.base.weight.device)  # the model may have been moved since
        layer.base.weight, layer.unmerged_weight = original, ()


@torch.no_grad()
def merged_weight(layer: LoraLinear) -> Tensor:
    """W0 + scaling · B A (d_out, d_in): summed in fp32 or wider, then rounded once to the dtype of W0."""
    original, change = layer.base.weight, layer.change()
    return (original.to(change.dtype) + change).to(original.dtype)


def check_merged(layers: Mapping[str, LoraLinear], *, merged: bool) -> None:
    """Refuses layers of which one is merged, or with `merged` one that is not.

    Raises:
        ValueError: There is one.
    """
    wrong = [name for name, layer in layers.items() if layer.merged is not merged]
    if wrong:
        must, call = ("be merged", "merge_lora") if merged else ("not be merged", "unmerge_lora")
        raise ValueError(f"Every LoRA layer must {must}, but {wrong[0]!r} is otherwise. Call `{call}` first.")


def _layers_to_change(model: nn.Module, *, merged: bool) -> list[LoraLinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("`model` must have LoRA layers, but got none. Call `inject_lora` or `load_adapter` first.")
    check_merged(layers, merged=merged)
    return list(layers.values())
