"""Optimizer and learning-rate schedule of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from lorasweep.config.run import OptimConfig, ScheduleConfig
from lorasweep.methods import ParameterGroup


def refine_groups(
    model: nn.Module, groups: Sequence[ParameterGroup], config: OptimConfig, *, head: Sequence[str]
) -> list[ParameterGroup]:
    """Returns a method's groups split by learning rate: `optim.lr_ratio_head` and `optim.layer_decay`.

    Args:
        model: A prepared model.
        groups: What trains in it; of LoRA's, `other` trains in full beside the changes.
        config: The run's.
        head: Names of the model's new modules.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    top = max((block for block in map(block_of, names.values()) if block is not None), default=-1)
    refined: dict[tuple[str, float], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group.params:
            name = names[id(parameter)]
            is_head = group.name == "other" or name.startswith(tuple(f"{module}." for module in head))
            factor = group.lr_factor * (config.lr_ratio_head if is_head else 1.0)
            factor *= config.layer_decay ** blocks_above(name, top=top)
            refined.setdefault((group.name, factor), []).append(parameter)
    return [ParameterGroup(name=name, params=tuple(of), lr_factor=factor) for (name, factor), of in refined.items()]


def block_of(name: str) -> int | None:
    """Returns the number of a parameter's block, the first number in its name; None outside of blocks."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def blocks_above(name: str, *, top: int) -> int:
    """Returns how many blocks lie above a parameter's: 0 of the last block and what comes after it."""
    block = block_of(name)
    if block is not None:
        return top - block
    return top + 1 if "embed" in name else 0


def build_optimizer(config: OptimConfig, groups: Sequence[ParameterGroup]) -> torch.optim.AdamW:
    """Returns AdamW, each group at `optim.lr` times its factor. Weight decay spares vectors (norms, biases)."""
    options = []
    for group in groups:
        for decays in (True, False):
            params = [p for p in group.params if (p.ndim >= 2) == decays]
            if params:
                decay = config.weight_decay if decays else 0.0
                options.append({"params": params, "lr": config.lr * group.lr_factor, "weight_decay": decay})
    optimizer = torch.optim.AdamW(options, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    # It would undo a gradient scaler's work by itself, so Lightning forbids clipping. There is no scaler in bf16.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def schedule_factor(config: ScheduleConfig, step: int, *, max_steps: int) -> float:
    """Returns the share of the peak learning rate at a step (0 is the first), for a run of `max_steps`.

    Warm-up rises linearly over `warmup_fraction` of the steps; then `constant` stays, while `linear` and `cosine` fall
    so that the step after the last would be 0.
    """
    warmup = math.ceil(config.warmup_fraction * max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(max_steps - warmup, 1), 1.0)
    if config.name == "linear":
        return 1.0 - progress
    if config.name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def build_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, *, max_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns the schedule, stepped once per optimizer step. Pruning a run never changes its length."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(config, step, max_steps=max_steps))
