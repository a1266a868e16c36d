"""Puts LoRA layers in place of the layers that `targets` found, and freezes everything else."""

from __future__ import annotations

import torch
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.layers import LoraLinear, lora_layers
from lorasweep.lora.targets import Coverage, find_targets


def inject_lora(
    model: nn.Module,
    config: LoraConfig,
    *,
    generator: torch.Generator | None = None,
    allow_full_rank: bool = False,
) -> Coverage:
    """Adapts `model` in place: matched linear layers become `LoraLinear`, and only their A and B train.

    No weight of the base is written to, so models that share frozen tensors can each be injected.

    Args:
        model: Any module that contains the layers.
        config: Targets, rank, α, scaling and dropout.
        generator: CPU random stream for the A matrices, drawn in the model's order; torch's own when None.
        allow_full_rank: Whether a rank above a layer's own is a warning instead of an error.

    Returns:
        What was matched and what was not.

    Raises:
        ValueError: The model has LoRA layers already, or `find_targets` refuses; the model is then unchanged.
    """
    check_not_injected(model)
    coverage = find_targets(model, config, allow_full_rank=allow_full_rank)
    chosen = set(coverage.layers)
    layers = {name: layer for name, layer in model.named_modules() if name in chosen}
    freeze(model)
    for layer in layers.values():
        assert isinstance(layer, nn.Linear)
        adapted = LoraLinear(layer, config, rank=config.rank, alpha=config.alpha, generator=generator)
        replace_module(model, layer, adapted)
    return coverage


def check_not_injected(model: nn.Module) -> None:
    """Refuses a model that has LoRA layers.

    Raises:
        ValueError: There is one.
    """
    names = list(lora_layers(model))
    if names:
        raise ValueError(
            f"`model` must have no LoRA layers yet, but got one with {len(names)}, such as {names[0]!r}. "
            "Load the base model again, or inject a copy made before."
        )


def freeze(model: nn.Module) -> None:
    """Stops every parameter from training; one that is frozen already is not touched (it may be shared)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `model` holds `old`, so that a layer used under two names stays one layer."""
    new.train(old.training)
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in list(parent._modules.items()):
            if child is old:  # `named_children` would skip the second name of one layer
                setattr(parent, name, new)
