"""`model.attention=auto`: chooses a model's attention implementation by device and length of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasweep.models.pretrained import quiet_transformers

CANDIDATES = ("sdpa", "eager")
MAX_EAGER_TOKENS = 64
"""Maximum median length of the training examples, in tokens, at which `auto` takes eager on a CPU.

Forward and backward passes were measured at 16 to 512 tokens (docs/benchmarks.md). Up to 64 tokens, eager took 0.64 to
0.98 of sdpa's time on an encoder and 0.81 to 1.01 on a causal model. Above, eager may be slower in fp32, and its memory
grows with the square of the length. So sdpa is taken there, although eager stays faster in bf16 on a CPU.
"""


class AttentionChoice(NamedTuple):
    """The attention implementation of a model, and why it was chosen."""

    name: str
    """`sdpa` or `eager`; `own` for a model that does not come from transformers."""
    reason: str
    """Completes "Attention is eager: ..."."""


def choose_attention(model: nn.Module, *, lengths: Tensor | Sequence[int], device: torch.device) -> AttentionChoice:
    """Sets the attention implementation that fits device and examples, and returns it with the reason.

    The choice is the same each time for the same model, examples and device.

    Args:
        model: A base model as `load_base` returns it. Only its attention implementation changes.
        lengths: Number of tokens of each training example, at least one example.
        device: The device on which the model trains.
    """
    if not isinstance(model, PreTrainedModel):
        return AttentionChoice("own", "transformers did not make this model")
    usable = [name for name in CANDIDATES if _set_attention(model, name)]
    if len(usable) < len(CANDIDATES):
        return AttentionChoice(str(model.config._attn_implementation), "the model has no other")
    tokens = int(torch.as_tensor(lengths).median())
    name = "eager" if device.type == "cpu" and tokens <= MAX_EAGER_TOKENS else "sdpa"
    _set_attention(model, name)
    device_name = "a GPU" if device.type == "cuda" else "a CPU"
    return AttentionChoice(name, f"the median example has {tokens} tokens, on {device_name}")


def _set_attention(model: PreTrainedModel, name: str) -> bool:
    """Sets an implementation if the model has it, and returns whether it has."""
    try:
        with quiet_transformers():
            model.set_attn_implementation(name)
    except (ValueError, ImportError, RuntimeError):
        return False
    return bool(model.config._attn_implementation == name)
