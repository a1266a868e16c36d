"""Builds the model that a run trains: a copy of the base that the method has prepared."""

from __future__ import annotations

import torch
from torch import nn

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.inject import replace_dropout
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.models.load import BaseModel
from lorasweep.training.components import check_components
from lorasweep.training.fsdp import check_shardable
from lorasweep.training.optim import check_optim


def prepare_model(config: RunConfig, base: BaseModel) -> nn.Module:
    """Returns the prepared model. It shares the base's weights, which are never written."""
    # The global seed is set before the method draws, and again after it: neither earlier draws nor the method's draws
    # may change the dropout masks.
    torch.manual_seed(config.seeds.dropout)
    model = copy_sharing_weights(base.model)
    generator = torch.Generator().manual_seed(config.seeds.init)
    METHODS[config.method.name].prepare(model, config.method, generator=generator, new_head_names=base.new_head_names)
    replace_dropout(model)
    torch.manual_seed(config.seeds.dropout)
    model.train()  # turns dropout on; Lightning switches modes for evaluations and restores them
    if config.trainer.activation_checkpointing:
        _checkpoint_activations(model)
    if config.trainer.compile:
        model.compile()
    return model


def check_run(config: RunConfig, base: BaseModel) -> None:
    """Refuses settings that do not fit the base model or have no effect, before anything is written."""
    METHODS[config.method.name].check(base.model, config.method, new_head_names=base.new_head_names)
    check_optim(config)
    check_components(config)
    if config.trainer.is_sharded:
        check_shardable(base.model)
    has_head = bool(base.new_head_names) and config.method.name != "frozen"
    if isinstance(config.method, LoraConfig):
        has_head = has_head or bool(config.method.modules_to_save)
    if config.optim.lr_ratio_head != 1 and not has_head:
        raise ConfigError(
            f"`optim.lr_ratio_head` must be 1 for a model without a new head, but got {config.optim.lr_ratio_head!r}. "
            "Remove it: it would have no effect."
        )


def _checkpoint_activations(model: nn.Module) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            "`trainer.activation_checkpointing` must be false for a model that does not support it, but is true."
        )
    # transformers 5 renames the method
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]
