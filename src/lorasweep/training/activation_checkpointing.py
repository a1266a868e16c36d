"""Activation checkpointing: each block of a model keeps only its inputs, and is computed again in the backward pass.

transformers wraps each block in torch's `checkpoint`. The backward pass computes a block after the forward pass has
left its contexts, on a GPU in another thread. So what a block depends on is saved when the forward pass reaches it:
the slots' dropout streams, and the kind of dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasweep.errors import ConfigError
from lorasweep.lora.dropout import FunctionalDropout, drop_from_default_stream
from lorasweep.lora.packed.layers import packed_trained_modules
from lorasweep.lora.packed.slots import Slots

BlockContexts: TypeAlias = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Called before each block. Returns the contexts in which the block is computed first, and again."""


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
