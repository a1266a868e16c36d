"""Prepares the model of a run: the method's trained parameters, dropout, activation checkpointing, `torch.compile`.

With activation checkpointing each block of a model keeps only its inputs, and is computed again in the backward pass.
transformers wraps each block in torch's `checkpoint`. The backward pass computes a block after the forward pass has
left its contexts, on a GPU in another thread. So what a block depends on is saved when the forward pass reaches it:
the slots' dropout streams, and the kind of dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.dropout import FunctionalDropout, drop_from_default_stream
from lorasweep.lora.inject import replace_dropout
from lorasweep.lora.packed.layers import packed_trained_modules
from lorasweep.lora.packed.slots import Slots
from lorasweep.methods import bind
from lorasweep.models.load import BaseModel
from lorasweep.training.fsdp import check_shardable
from lorasweep.training.loggers import check_components
from lorasweep.training.optim import check_optim

BlockContexts: TypeAlias = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Called before each block. Returns the contexts in which the block is computed first, and again."""


def prepare_model(config: RunConfig, base: BaseModel) -> nn.Module:
    """Returns the prepared model. It shares the base's weights, which are never written."""
    # The global seed is set before the method draws, and again after it: neither earlier draws nor the method's draws
    # may change the dropout masks.
    torch.manual_seed(config.seeds.dropout)
    generator = torch.Generator().manual_seed(config.seeds.init)
    model = bind(config.method).prepare(base, generator=generator)
    replace_dropout(model)
    torch.manual_seed(config.seeds.dropout)
    model.train()  # turns dropout on; Lightning switches modes for evaluations and restores them
    if config.trainer.activation_checkpointing:
        # torch's compiler takes no contexts of ours
        checkpoint_activations(model, None if config.trainer.compile else save_block_contexts())
    if config.trainer.compile:
        model.compile()
    return model


def check_run(config: RunConfig, base: BaseModel) -> None:
    """Refuses settings that do not fit the base model or have no effect, before anything is written."""
    bind(config.method).check(base.model, new_head_names=base.new_head_names)
    check_optim(config)
    check_components(config)
    if config.trainer.is_sharded:
        check_shardable(base.model)


def checkpoint_activations(model: nn.Module, block_contexts: BlockContexts | None = None) -> None:
    """Lets a model of transformers keep only the inputs of its blocks while it trains. It can be called again.

    Raises:
        ConfigError: The model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            "`trainer.activation_checkpointing` must be false for a model that does not support it, but is true."
        )
    # transformers 5 renames the method
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False} | ({} if block_contexts is None else {"context_fn": block_contexts}))
    # only the reentrant way needs inputs that require gradients
    model.disable_input_require_grads()  # type: ignore[operator]
    # a block that slots train in full has a slot's parameters only during the call, so it is not computed again
    for trained in packed_trained_modules(model).values():
        for block in trained.base.modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.gradient_checkpointing = False


def save_block_contexts(slots: Slots | None = None) -> BlockContexts:
    """Returns the contexts of blocks that train inside `FunctionalDropout`, alone or in slots."""

    # a function without `self`, because copies of a pack's model must not copy the slots with it
    def save() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if slots is None:  # torch sets back its default stream
            return nullcontext(), FunctionalDropout(drop_from_default_stream)
        return nullcontext(), _enter_both(FunctionalDropout(slots.drop), slots.save_streams())

    return save


@contextmanager
def _enter_both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield
