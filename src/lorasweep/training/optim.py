"""Optimizer and learning-rate schedule of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorasweep.config.components import Component, instantiate, list_argument_names
from lorasweep.config.run import OptimConfig, OptimizerComponent, RunConfig, ScheduleConfig
from lorasweep.errors import ConfigError
from lorasweep.methods import ParameterGroup, bind


def build_optimizer(
    config: OptimConfig | OptimizerComponent, groups: Sequence[ParameterGroup]
) -> torch.optim.Optimizer:
    """Returns AdamW or the optimizer of `optim._target_`. Vectors (norms, biases) have no weight decay."""
    param_groups: list[dict[str, Any]] = []
    for trained in groups:
        for decays in (True, False):
            params = [p for p in trained.params if (p.ndim >= 2) == decays]
            if params:
                decay = config.weight_decay if decays else 0.0
                param_groups.append({"params": params, "lr": config.lr * trained.lr_factor, "weight_decay": decay})
    if isinstance(config, OptimizerComponent):
        names, takes_any = list_argument_names(config.target, key="optim")
        if "weight_decay" not in names and not takes_any:
            if config.weight_decay:
                raise ConfigError(
                    f"`optim.weight_decay` must be 0 with {config.target!r}, but got {config.weight_decay!r}. "
                    "This optimizer has no weight decay."
                )
            for group in param_groups:
                del group["weight_decay"]
        optimizer = instantiate(config, key="optim", expected=torch.optim.Optimizer, params=param_groups, lr=config.lr)
    else:
        optimizer = torch.optim.AdamW(param_groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    # Lightning forbids clipping for optimizers that can unscale gradients by themselves, such as fused AdamW. But bf16
    # needs no gradient scaler, so clipping is right.
    setattr(optimizer, "_step_supports_amp_scaling", False)  # noqa: B010 (no attribute that mypy knows)
    return optimizer


def check_optim(config: RunConfig) -> None:
    """Checks the settings of optimizer and schedule by building both for one matrix."""
    group = ParameterGroup(name="check", params=(nn.Parameter(torch.zeros(2, 2)),), lr_factor=1.0)
    build_schedule(config, build_optimizer(config.optim, [group]))


def schedule_factor(config: ScheduleConfig, step: int, *, max_steps: int) -> float:
    """Returns the factor of the peak learning rate after `step` of `max_steps` optimizer steps.

    The factor rises linearly over `warmup_fraction` of the steps. Then it is the factor of transformers'
    `get_scheduler` without warm-up.
    *Differs:* transformers' warm-up begins at 0, so its first step does not train.
    """
    warmup = math.ceil(config.warmup_fraction * max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.name == "constant":
        return 1.0
    num_steps = max(max_steps - warmup, 1)
    progress = min(step - warmup, num_steps) / num_steps
    left = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
    return left * (1 - config.min_lr_rate) + config.min_lr_rate


def build_schedule(config: RunConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Returns a run's schedule, which is stepped once per optimizer step."""
    schedule, max_steps = config.schedule, config.trainer.max_steps
    if isinstance(schedule, Component):
        return instantiate(schedule, key="schedule", expected=torch.optim.lr_scheduler.LRScheduler, optimizer=optimizer)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule_factor(schedule, step, max_steps=max_steps)
    )


def configure_optimizers(config: RunConfig, model: nn.Module) -> dict[str, Any]:
    """Returns what Lightning's `configure_optimizers` returns, for a prepared model."""
    groups = bind(config.method).trainable_groups(model, lr_ratio_b=config.optim.lr_ratio_b)
    optimizer = build_optimizer(config.optim, groups)
    schedule = build_schedule(config, optimizer)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
