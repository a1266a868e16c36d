"""LoRA as functions of tensors, without modules or state. Single runs and packs call the same functions.

The rows of x are slot-major: the first rows belong to slot 0, the next rows to slot 1, and so on. The rows of slot k
are multiplied by A and B of slot k only. A single run is a pack of one slot.

The product A x has the shape (slots, rank, tokens). On a CPU this is up to five times faster than the shape
(slots, tokens, rank).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, linear

from lorasweep.config.method import Scaling

RowRanges = tuple[tuple[int, int], ...]
"""Ranges (first row, last row + 1) of a fused projection's rows, one for each part that has its own A and B."""
UpdateFactor = float | Float[Tensor, "slots 1 1"]
"""Factor of B A x, as one number or one per slot: the scaling, divided by (1 - dropout) if inputs are dropped."""


def scaling_factor(*, alpha: float, rank: int, rule: Scaling) -> float:
    """Returns the factor of B A x: α/r (LoRA, arXiv 2106.09685, section 4.1) or α/√r (rsLoRA, arXiv 2312.03732)."""
    return alpha / rank if rule == "alpha_over_rank" else alpha / math.sqrt(rank)


def lora_linear(
    x: Float[Tensor, "*rows d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    lora_a: Float[Tensor, "slots rank d_in"],
    lora_b: Float[Tensor, "slots d_out rank"],
    *,
    factor: UpdateFactor,
    keep: Bool[Tensor, "*rows d_in"] | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """Returns W0 x + b + factor · B A (x · keep): equation 3 of LoRA (arXiv 2106.09685) for the rows of each slot.

    *Differs* from PEFT: A and B are cast to the dtype of x. PEFT casts x to the dtype of A and so keeps a second copy.

    Args:
        x: Inputs in the dtype of `weight`; under autocast in any dtype. The number of rows is a multiple of the slots.
        weight: The base's weight, or a transposed view of it.
        bias: The base's bias.
        lora_a: In any dtype; its gradient has that dtype.
        lora_b: Like `lora_a`.
        factor: In fp32 or wider.
        keep: Dropout mask, False for each input that is dropped before A; None keeps all inputs.

    Returns:
        The output in the dtype of `weight` (under autocast: in autocast's dtype).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    output: Tensor = _LoraLinear.apply(x, weight, bias, lora_a, lora_b, factor, keep)  # type: ignore[no-untyped-call]
    return output


def linear_update(
    x: Float[Tensor, "*rows d_in"],
    lora_a: Float[Tensor, "slots rank d_in"],
    lora_b: Float[Tensor, "slots d_out rank"],
    *,
    factor: UpdateFactor,
    keep: Bool[Tensor, "*rows d_in"] | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """Returns factor · B A (x · keep), without the base's output. The arguments are those of `lora_linear`."""
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    u = a @ _split_by_slot(x if keep is None else x * keep, len(a)).mT * factor  # (slots, rank, tokens)
    return (u.to(x.dtype).mT @ b.mT).view(*x.shape[:-1], b.shape[1])


def embedding_update(
    tokens: Int[Tensor, "*rows"],
    lora_a: Float[Tensor, "slots rank vocabulary"],
    lora_b: Float[Tensor, "slots d_out rank"],
    *,
    factor: UpdateFactor,
) -> Float[Tensor, "*rows d_out"]:
    """Returns factor · B a for each token, where a is the token's column in A of the token's slot."""
    slot = torch.arange(len(lora_a), device=tokens.device)[:, None]
    looked_up = lora_a[slot, :, tokens.reshape(len(lora_a), -1)]  # (slots, tokens, rank)
    return (looked_up @ lora_b.mT * factor).view(*tokens.shape, lora_b.shape[1])


def conv2d_update(
    x: Float[Tensor, "rows d_in height width"],
    conv: nn.Conv2d,
    lora_a: Float[Tensor, "slots rank patch"],
    lora_b: Float[Tensor, "slots d_out rank"],
    *,
    factor: UpdateFactor,
    keep: Bool[Tensor, "rows d_in height width"] | None = None,
) -> Float[Tensor, "rows d_out new_height new_width"]:
    """Returns factor · B A (x · keep). A is a convolution with the settings of `conv`, B is a 1 × 1 convolution."""
    a, b = lora_a.to(x.dtype), (lora_b * factor).to(x.dtype)
    slots = (x if keep is None else x * keep).chunk(len(a))
    u = [
        conv._conv_forward(rows, a_k.view(-1, *conv.weight.shape[1:]), None) for rows, a_k in zip(slots, a, strict=True)
    ]
    return torch.cat([conv2d(u_k, b_k[:, :, None, None]) for u_k, b_k in zip(u, b, strict=True)])


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b over all rows, then y_k += (B_k u_k)ᵀ with u_k = factor_k · A_k (x_k · keep_k)ᵀ for each slot.

    It saves memory and time in three ways. Backward keeps x itself and no copy, so layers with the same input share it.
    The factor multiplies u, which is smaller than y. The updates are added to y in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        factor: UpdateFactor,
        keep: Tensor | None,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        by_slot = _split_by_slot(x, len(a))  # (slots, tokens, d_in)
        keep = None if keep is None else keep.reshape(by_slot.shape)
        y = linear(by_slot.flatten(0, 1), weight, bias)  # (slots · tokens, d_out)
        u = a.bmm(_apply_keep_mask(by_slot, keep).mT).mul_(factor)  # (slots, rank, tokens)
        # in place, because no other code has a reference to y yet
        y.view(*by_slot.shape[:2], y.shape[-1]).baddbmm_(u.mT, b.mT)
        # `by_slot` is a view of x, so no copy of x is saved
        ctx.save_for_backward(by_slot, weight, a, b, u, keep)
        ctx.factor, ctx.x_shape, ctx.dtypes = factor, x.shape, (lora_a.dtype, lora_b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_slot, weight, a, b, u, keep = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        flat = grad.reshape(-1, grad.shape[-1])  # (slots · tokens, d_out)
        grad = flat.view(*by_slot.shape[:2], flat.shape[-1])  # (slots, tokens, d_out)
        grad_x = grad_a = None
        if needs_x or needs_a:
            grad_u = b.mT.bmm(grad.mT).mul_(ctx.factor)  # (slots, rank, tokens)
            grad_a = grad_u.bmm(_apply_keep_mask(by_slot, keep)).to(ctx.dtypes[0]) if needs_a else None
        if needs_x:
            grad_x = flat.mm(weight).view(by_slot.shape)
            # without a mask, the product is added in place and needs no temporary tensor of x's size
            grad_x = grad_x.baddbmm_(grad_u.mT, a) if keep is None else grad_x.add_(grad_u.mT.bmm(a).mul_(keep))
            grad_x = grad_x.view(ctx.x_shape)
        grad_b = u.bmm(grad).mT.to(ctx.dtypes[1]) if needs_b else None
        grad_weight = flat.t().mm(by_slot.flatten(0, 1)) if needs_weight else None
        grad_bias = flat.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None


def _split_by_slot(x: Tensor, slots: int) -> Tensor:
    """Returns (slots · rows, ..., width) as (slots, tokens, width)."""
    return x.reshape(slots, x.shape[:-1].numel() // slots, x.shape[-1])


def _apply_keep_mask(by_slot: Tensor, keep: Tensor | None) -> Tensor:
    return by_slot if keep is None else by_slot * keep
