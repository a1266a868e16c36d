"""Puts LoRA layers in place of the layers that `targets` found, and freezes everything else."""

from __future__ import annotations

import torch
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.layers import AdaptedLayer, LoraLayer
from lorasweep.lora.targets import Coverage, plan_targets
from lorasweep.lora.trained import copy_biases, copy_to_train, find_trained_biases, find_trained_modules


def inject_lora(
    model: nn.Module,
    config: LoraConfig,
    *,
    generator: torch.Generator | None = None,
    allow_full_rank: bool = False,
    device: str | None = None,
) -> Coverage:
    """Adapts `model` in place: matched layers become LoRA layers, and only those and what `config` names train.

    No tensor of the base is written to, so models that share frozen tensors can each be injected.

    Args:
        model: Any module that contains the layers.
        config: What to adapt and how.
        generator: CPU random stream for A and B, drawn in the model's order; torch's own when None.
        allow_full_rank: Whether a rank above a layer's own is accepted.
        device: Where A and B live; the base's when None.

    Returns:
        The layers that were matched, and those that were not.

    Raises:
        ValueError: The model has LoRA layers already, or `find_targets` refuses; the model is then unchanged.
    """
    check_not_injected(model)
    coverage, targets = plan_targets(model, config, allow_full_rank=allow_full_rank)
    layers = [
        LoraLayer(model.get_submodule(name), target, generator=generator, device=device)
        for name, target in targets.items()
    ]
    modules = find_trained_modules(model, config.modules_to_save)
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
    """Refuses a model that has LoRA layers, packed or not.

    Raises:
        ValueError: It has some.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
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
