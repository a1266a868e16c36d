"""Replaces the layers that `targets` found by LoRA layers, and freezes everything else."""

from __future__ import annotations

import torch
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.fully_trained import copy_biases, copy_to_train, find_trained_biases, match_modules_to_save
from lorasweep.lora.layers import AdaptedLayer, LoraLayer
from lorasweep.lora.targets import Coverage, plan_targets


def inject_lora(
    model: nn.Module,
    config: LoraConfig,
    *,
    generator: torch.Generator | None = None,
    allow_full_rank: bool = False,
    device: str | None = None,
) -> Coverage:
    """Adapts `model` in place: matched layers become LoRA layers. All else is frozen, except what `config` names.

    No tensor of the base is written to, so models that share frozen tensors can each be injected.

    Args:
        model: Any module that contains the layers.
        config: What to adapt and how.
        generator: CPU random stream for A and B, drawn in the model's order; torch's own if None.
        allow_full_rank: Whether the rank may be above the smaller side of a layer's weight.
        device: Device of A and B; the base's if None.

    Returns:
        The layers that were matched, and those that were not.

    Raises:
        ValueError: The model has LoRA layers already, or `find_targets` refuses. The model is then unchanged.
    """
    check_not_injected(model)
    coverage, targets = plan_targets(model, config, allow_full_rank=allow_full_rank)
    layers = [
        LoraLayer(model.get_submodule(name), target, generator=generator, device=device)
        for name, target in targets.items()
    ]
    modules = match_modules_to_save(model, config.modules_to_save)
    biases = find_trained_biases(model, config.bias, targets, modules)
    # from here on nothing can fail, so that a model that is refused is unchanged
    freeze(model)
    copy_biases(model, biases)
    for layer in layers:
        replace_module(model, layer.base, layer)
    for trained in copy_to_train(modules).values():
        replace_module(model, trained.base, trained)
    return coverage


def check_not_injected(model: nn.Module) -> None:
    """Raises a ValueError if the model has LoRA layers, packed or not."""
    names = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    if names:
        raise ValueError(
            f"`model` must have no LoRA layers yet, but {names[0]!r} is one. "
            "Load the base model again, or copy it before you inject."
        )


def freeze(model: nn.Module) -> None:
    """Stops every parameter from training. Frozen ones are not touched, because other models may share them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `model` has `old`, so that a layer that is used under two names stays one layer."""
    new.train(old.training)
    for parent in list(model.modules()):
        if parent is new:
            continue
        for name, child in list(parent._modules.items()):
            if child is old:  # `named_children` would skip the second name of one layer
                setattr(parent, name, new)
