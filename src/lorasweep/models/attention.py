"""`model.attention=auto`: chooses the attention implementation for the device and the length of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasweep.models.pretrained import quiet_transformers

IMPLEMENTATIONS = ("sdpa", "eager")
MAX_EAGER_TOKENS = 64
"""Maximum median length of the training examples, in tokens, for which `auto` uses eager attention on a CPU.

Forward and backward passes were measured at 16 to 512 tokens (docs/benchmarks.md). Up to 64 tokens, eager took 0.64 to
0.98 of sdpa's time on an encoder and 0.81 to 1.01 on a causal model. For longer examples, eager may be slower in fp32,
and its memory grows with the square of the length. In bf16 eager stays faster, but the rule ignores the dtype.
"""


class AttentionChoice(NamedTuple):
    """The attention implementation of a model, with the reason."""

    name: str
    """`sdpa` or `eager`."""
    reason: str
    """The end of the sentence "Attention is eager: ..."."""


def choose_attention(model: nn.Module, *, lengths: Tensor | Sequence[int], device: torch.device) -> AttentionChoice:
    """Sets the attention implementation that suits device and examples. Returns its name and the reason.

    Nothing is measured, so the same model, examples and device always get the same implementation.

    Args:
        model: A model from `load_base`. Only its attention implementation changes.
        lengths: Number of tokens of each training example, at least one example.
        device: The device on which the model trains.
    """
    assert isinstance(model, PreTrainedModel)
    usable = [name for name in IMPLEMENTATIONS if _set_attention(model, name)]
    if len(usable) < len(IMPLEMENTATIONS):
        return AttentionChoice(str(model.config._attn_implementation), "the model has no other implementation")
    tokens = int(torch.as_tensor(lengths).median())
    name = "eager" if device.type == "cpu" and tokens <= MAX_EAGER_TOKENS else "sdpa"
    _set_attention(model, name)
    device_name = "a GPU" if device.type == "cuda" else "a CPU"
    return AttentionChoice(name, f"the median example has {tokens} tokens, on {device_name}")


def _set_attention(model: PreTrainedModel, name: str) -> bool:
    """Sets an implementation. Returns False if the model does not have it."""
    try:
        with quiet_transformers():
            model.set_attn_implementation(name)
    except (ValueError, ImportError, RuntimeError):
        return False
    return bool(model.config._attn_implementation == name)
