"""Prepares the model of a run or a pack: trained parameters, dropout, activation checkpointing, `torch.compile`.

With activation checkpointing each block of a model keeps only its inputs, and is computed again in the backward pass.
transformers wraps each block in torch's `checkpoint`. The backward pass computes a block after the forward pass has
left its contexts, on a GPU in another thread. So what a block depends on is saved when the forward pass reaches it:
the number of dropout masks so far, and the kind of dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError
from lorasweep.lora import Slots, inject_packed_lora
from lorasweep.lora.dropout import DropoutMasks, FunctionalDropout
from lorasweep.lora.inject import replace_dropout
from lorasweep.lora.packed.layers import packed_trained_modules
from lorasweep.methods import bind, copy_sharing_weights, draw_head
from lorasweep.models.load import BaseModel
from lorasweep.training.fsdp import check_shardable, find_blocks
from lorasweep.training.loggers import check_components
from lorasweep.training.optim import check_optim

BlockContexts: TypeAlias = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Called before each block. Returns the contexts in which the block is computed first, and again."""


def prepare_model(config: RunConfig, base: BaseModel, *, masks: DropoutMasks | None = None) -> nn.Module:
    """Returns the model of a run outside of slots. It shares the base's weights, which are never written.

    Dropout draws from `masks`, or else from torch's default stream.
    """
    # The global seed is set before the method draws, and again after it: neither earlier draws nor the method's draws
    # may change the dropout masks.
    torch.manual_seed(config.seeds.dropout)
    generator = torch.Generator().manual_seed(config.seeds.init)
    model = bind(config.method).prepare(base, generator=generator)
    if masks is not None:
        replace_dropout(model, masks)
    return _finish(model, config, masks)


def prepare_slots(configs: Sequence[RunConfig], base: BaseModel) -> tuple[nn.Module, Slots]:
    """Returns a packed model with a slot for each run. It shares the base's weights, which are never written."""
    torch.manual_seed(configs[0].seeds.dropout)
    model = copy_sharing_weights(base.model)
    slots = inject_packed_lora(
        model,
        [bind(config.method).get_slot_config(base.new_head_names) for config in configs],
        generators=[torch.Generator().manual_seed(config.seeds.init) for config in configs],
        dropout_seeds=[config.seeds.dropout for config in configs],
        prepare_copy=functools.partial(draw_head, names=base.new_head_names),
    )
    return _finish(model, configs[0], slots.masks), slots


def _finish(model: nn.Module, config: RunConfig, masks: DropoutMasks | None) -> nn.Module:
    torch.manual_seed(config.seeds.dropout)
    model.train()  # turns dropout on; Lightning switches modes for evaluations and restores them
    if config.trainer.activation_checkpointing:
        # torch's compiler takes no contexts of ours
        checkpoint_activations(model, None if config.trainer.compile or masks is None else save_block_contexts(masks))
    if config.trainer.compile:
        # Block by block, because the blocks have equal code, which is compiled once.
        for block in [*find_blocks(model)] or [model]:
            block.compile(dynamic=True)
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


def save_block_contexts(masks: DropoutMasks) -> BlockContexts:
    """Returns the contexts of blocks that train inside `FunctionalDropout`."""

    # a function without `self`, because copies of a model must not copy the masks with it
    def save() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _enter_both(FunctionalDropout(masks.drop), masks.save())

    return save


@contextmanager
def _enter_both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield
