"""A training loss of torch, or of the user, that `data.loss` names by `_target_`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasweep.config.components import Component, argument_names, instantiate
from lorasweep.data.split import IGNORED
from lorasweep.errors import ConfigError, describe_error


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnLoss:
    """The loss that trains a run. Evaluations keep the task's own loss, so that runs with different losses compare."""

    name: str
    module: nn.Module

    def compute(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of each item, (items,), from its logits (items, classes) or its number (items,).

        An item is an example, or a scored token of text. A further axis of the module's result is averaged.

        Raises:
            ConfigError: The module does not take these values, or does not return a loss of each item.
        """
        try:
            losses = self.module.to(predicted.device)(predicted, target)
        except Exception as error:  # the class may be the user's
            if "out of memory" in str(error):
                raise
            raise ConfigError(
                f"`data.loss` must take logits of shape {tuple(predicted.shape)} and targets of shape "
                f"{tuple(target.shape)}, but {self.name} fails: {describe_error(error)}."
            ) from error
        if not isinstance(losses, Tensor) or losses.shape[:1] != target.shape[:1]:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(
                f"`data.loss` must give a loss for each of the {len(target)} items, because runs in a pack are told "
                f"apart by them, but {self.name} gives {shape}. Leave out its mean or sum."
            )
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def spread(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss at each position, (batch, length); 0 where no token is scored."""
        scored = targets != IGNORED
        losses = self.compute(logits[scored], targets[scored])
        return torch.zeros(targets.shape, device=losses.device, dtype=losses.dtype).masked_scatter(scored, losses)


def build_own_loss(component: Component) -> OwnLoss:
    """Creates the loss of `data.loss._target_`; a class with an argument `reduction` gets `none`.

    Raises:
        ConfigError: It is no `torch.nn.Module`, does not take the arguments, or has parameters.
    """
    takes_reduction = "reduction" in argument_names(component.target, key="data.loss")[0]
    if "reduction" in component.arguments:
        raise ConfigError(
            f"`data.loss.reduction` must be left out, but got {component.arguments['reduction']!r}. It is always none."
        )
    reduction = {"reduction": "none"} if takes_reduction else {}
    module = instantiate(component, key="data.loss", expected=nn.Module, **reduction)
    if any(True for _ in module.parameters()):
        raise ConfigError(
            f"`data.loss` must have no trained parameters, but {component.name} has some. No optimizer trains them."
        )
    return OwnLoss(name=component.name, module=module)
