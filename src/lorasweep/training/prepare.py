"""The model that a run trains: a copy of the base, changed as the method says."""

from __future__ import annotations

import torch
from torch import nn

from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import BaseModel


def prepare_model(config: RunConfig, base: BaseModel) -> nn.Module:
    """Returns a model that trains as the method says; the base's own weights are shared and never written.

    Seeds are set here, before anything is drawn.
    """
    torch.manual_seed(config.seeds.dropout)
    model = copy_sharing_weights(base.model)
    generator = torch.Generator().manual_seed(config.seeds.init)
    METHODS[config.method.name].prepare(model, config.method, generator=generator, head=base.head)
    torch.manual_seed(config.seeds.dropout)
    model.train()  # dropout on; Lightning keeps each module's mode and switches it for evaluation
    if config.trainer.activation_checkpointing:
        checkpoint_activations(model)
    if config.trainer.compile:
        model.compile()
    return model


def checkpoint_activations(model: nn.Module) -> None:
    """Has the model compute its blocks' activations again in the backward pass.

    Raises:
        ConfigError: It does not know how.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            "`trainer.activation_checkpointing` must be false for a model that does not support it, but is true."
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]
