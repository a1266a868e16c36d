"""The optimizer and schedule of one slot of a pack: those of its solo run, on few large vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorasweep.config.run import RunConfig
from lorasweep.methods import METHODS, ParameterGroup
from lorasweep.training.optim import build_optimizer, build_schedule, split_by_learning_rate


class SlotOptimizer:
    """Clips and steps the parameters of a slot's solo model.

    A hundred small matrices per slot would take longer to step than to train. So parameters with the same settings
    become one vector (`flatten_parameters`), which `torch.optim.AdamW` steps in one call.

    *Differs* from the solo run: a parameter that never gets a gradient has a zero gradient here, so it decays. In both
    runs it has no effect on the model's outputs.
    """

    def __init__(self, model: nn.Module, config: RunConfig, *, head_names: Sequence[str]) -> None:
        groups = METHODS["lora"].trainable_groups(model, lr_ratio_b=config.optim.lr_ratio_b)
        groups = split_by_learning_rate(model, groups, config.optim, head_names=head_names)
        flat = [
            ParameterGroup(name=group.name, params=tuple(_flatten_group(group)), lr_factor=group.lr_factor)
            for group in groups
        ]
        self.parameters = [parameter for group in flat for parameter in group.params]
        self.optimizer = build_optimizer(config.optim, flat)
        self.schedule = build_schedule(config, self.optimizer)
        self.clip_norm = config.optim.clip_norm

    def step(self) -> float:
        """Makes one step, sets the gradients to zero, and returns the step's learning rate."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        # Not None: the gradients of the small parameters are views of these tensors.
        self.optimizer.zero_grad(set_to_none=False)
        return lr

    def state(self) -> dict[str, Any]:
        """Returns the state from which a run with the same settings goes on. It shares memory with the optimizer."""
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def _flatten_group(group: ParameterGroup) -> list[nn.Parameter]:
    """Returns at most two parameters: all matrices of the group as one row, and all vectors as one vector."""
    matrices, vectors = [p for p in group.params if p.ndim >= 2], [p for p in group.params if p.ndim < 2]
    # `build_optimizer` lets matrices decay, but no vectors, so the matrices keep two dimensions
    shapes = (matrices, (1, -1)), (vectors, (-1,))
    return [flatten_parameters(parameters, shape=shape) for parameters, shape in shapes if parameters]


def flatten_parameters(parameters: Sequence[nn.Parameter], *, shape: tuple[int, ...]) -> nn.Parameter:
    """Returns one parameter with the values of the given ones, which become views of it, as do their gradients.

    The gradients start as zeros. Backward passes add to them in place, as long as no gradient is set to None.

    Args:
        parameters: Parameters of any shapes and one dtype.
        shape: (-1,) or (1, -1).
    """
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    flat_grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, value, grad in zip(parameters, torch.split(flat, sizes), torch.split(flat_grad, sizes), strict=True):
        parameter.data, parameter.grad = value.view_as(parameter), grad.view_as(parameter)
    joined = nn.Parameter(flat.view(shape))
    joined.grad = flat_grad.view(shape)
    return joined
