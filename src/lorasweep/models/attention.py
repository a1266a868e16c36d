"""Chooses the attention implementation of a base model, and registers one for bf16 on a CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorasweep.models.pretrained import quiet_transformers

SDPA_FP32 = "sdpa_fp32"
"""Name of sdpa that computes in fp32 or wider, also for a model in 16 bits."""
IMPLEMENTATIONS = ("sdpa", SDPA_FP32, "eager")
"""The implementations that `choose_attention` may choose."""


MAX_EAGER_TOKENS = 256
"""Maximum number of tokens of a row at which eager attention computes in bf16 on a CPU.

Eager attention keeps the probabilities of all pairs of tokens. Where the processor multiplies bf16, forward and
backward take 0.3 to 1.1 of the time of sdpa in fp32 up to this length (an EPYC and a Xeon, benchmarks/MEASURED.md); at
512 tokens it depends on the processor."""


class AttentionChoice(NamedTuple):
    """The attention implementation of a model, with the reason."""

    name: str
    """One of `IMPLEMENTATIONS`, or the only one that the model has."""
    reason: str
    """The end of the sentence "Attention is eager: ..."."""


def choose_attention(
    model: nn.Module, *, device: torch.device, dtype: torch.dtype, max_tokens: int, has_cpu_bf16: bool
) -> AttentionChoice:
    """Sets the attention implementation that suits the model, the device and the data. Returns its name and the reason.

    Nothing is measured, so the same model, data and kind of device always get the same implementation.

    Args:
        model: A model of transformers.
        device: Where it trains.
        dtype: The dtype in which the model computes products.
        max_tokens: Number of tokens of the longest row of the data.
        has_cpu_bf16: Whether the processor multiplies bf16 in hardware.
    """
    assert isinstance(model, PreTrainedModel)
    usable = [name for name in ("sdpa", "eager") if _set_attention(model, name)]
    if len(usable) < 2:
        return AttentionChoice(str(model.config._attn_implementation), "the model has no other implementation")
    name, reason = "sdpa", f"the model computes in {str(dtype).removeprefix('torch.')} on a CPU"
    if device.type != "cpu":
        reason = "the model computes on a GPU"
    elif has_attention_dropout(model):
        # sdpa on a CPU would compute the same steps, with slower random numbers that slots of a pack share
        name, reason = "eager", "the model drops attention probabilities, on a CPU"
    elif dtype == torch.bfloat16:
        # Sdpa's backward pass is slow in bf16. Eager's products are slow without the processor's own bf16.
        if has_cpu_bf16 and max_tokens <= MAX_EAGER_TOKENS:
            name, reason = "eager", f"rows have at most {MAX_EAGER_TOKENS} tokens, and the CPU multiplies bf16"
        else:
            name, reason = SDPA_FP32, "the model computes in bf16 on a CPU"
    _set_attention(model, name)
    return AttentionChoice(name, reason)


def has_attention_dropout(model: nn.Module) -> bool:
    """Returns whether the configuration of a transformers model, or of its text part, drops attention probabilities."""
    config: Any = model.config
    rates = {**vars(config), **vars(config.get_text_config())}
    return any(value for name, value in rates.items() if "att" in name and "drop" in name)


def _set_attention(model: PreTrainedModel, name: str) -> bool:
    """Sets an implementation. Returns False if the model does not have it."""
    try:
        with quiet_transformers():
            model.set_attn_implementation(name)
    except (ValueError, ImportError, RuntimeError):
        return False
    return bool(model.config._attn_implementation == name)


def _attend_in_fp32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Computes transformers' sdpa attention in fp32, or in fp64 for an fp64 model. Returns it in the model's dtype."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(dtype)  # a mask that is added has the dtype of the scores
    query, key, wide = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(query.device.type, enabled=False):  # autocast would turn the inputs back to 16 bits
        output, _ = sdpa_attention_forward(module, query, key, wide, attention_mask, **kwargs)
    return output.to(value.dtype), None


AttentionInterface.register(SDPA_FP32, _attend_in_fp32)
AttentionMaskInterface.register(SDPA_FP32, sdpa_mask)
