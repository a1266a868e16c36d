"""Stacked changes as functions of tensors: rows are slot-major, and slot k's rows meet slot k's A and B alone.

The packed twin of `lora.functional`: the base's product is taken once over the rows of all slots, the low-rank ones are
batched over slots. No number of one slot is ever added to one of another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def packed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    factors: Tensor,
    keep: Tensor | None = None,
    b_mask: Tensor | None = None,
) -> Tensor:
    """W0 x + b + factor_k · B_k A_k (x · keep) for the rows of each slot k: `lora_linear` for every slot at once.

    *Differs* from LoRA's equation 3 (arXiv 2106.09685) as `lora_linear` does: A and B are cast at use, never x.

    Args:
        x: (slots · rows, ..., d_in), slot-major, in the dtype of `weight` (under autocast: any).
        weight: (d_out, d_in). May be the transposed view of a weight stored the other way round.
        bias: (d_out,) or nothing.
        lora_a: (slots, rank, d_in).
        lora_b: (slots, d_out, rank).
        factors: (slots,), in fp32 or wider: scaling, and with `keep` over 1 - dropout.
        keep: Mask of x's shape, False where the change does not see an input; nothing keeps all.
        b_mask: (slots, d_out, rank), False where B is zero and must stay so; nothing trains all of B.

    Returns:
        (slots · rows, ..., d_out) in the dtype of `weight` (under autocast: in autocast's dtype).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    output: Tensor = _PackedLinear.apply(x, weight, bias, lora_a, lora_b, factors, keep, b_mask)  # type: ignore[no-untyped-call]
    return output


def packed_change(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    factors: Tensor,
    keep: Tensor | None = None,
    b_mask: Tensor | None = None,
) -> Tensor:
    """The change alone, factor_k · B_k A_k (x · keep): (slots · rows, ..., d_in) to (slots · rows, ..., d_out).

    For a base that computes its own output, such as a quantised one. Arguments as in `packed_lora_linear`.
    """
    a, b = lora_a.to(x.dtype), masked_b(lora_b, b_mask).to(x.dtype)
    seen = split_rows(x if keep is None else x * keep, a.shape[0])  # (slots, tokens, d_in)
    u = (seen @ a.mT * factors[:, None, None]).to(x.dtype)  # (slots, tokens, rank)
    return (u @ b.mT).view(*x.shape[:-1], -1)


def split_rows(x: Tensor, slots: int) -> Tensor:
    """(slots · rows, ..., width) as (slots, tokens, width)."""
    tokens = x.shape[:-1].numel() // slots
    return x.reshape(slots, tokens, x.shape[-1])


def masked_b(lora_b: Tensor, b_mask: Tensor | None) -> Tensor:
    """B with gradient only where the mask is True."""
    return lora_b if b_mask is None else lora_b * b_mask


class _PackedLinear(torch.autograd.Function):
    """y = x Wᵀ + b over all rows, y_k += u_k B_kᵀ with u_k = factor_k · (x_k · keep_k) A_kᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        factors: Tensor,
        keep: Tensor | None,
        b_mask: Tensor | None,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        by_slot = split_rows(x, a.shape[0])  # (slots, tokens, d_in)
        keep = None if keep is None else keep.view(by_slot.shape)
        y = linear(by_slot.view(-1, x.shape[-1]), weight, bias)  # (slots · tokens, d_out)
        u = _seen_by_a(by_slot, keep).bmm(a.mT).mul_(factors[:, None, None])  # (slots, tokens, rank)
        y.view(*u.shape[:2], y.shape[-1]).baddbmm_(u, b.mT)
        ctx.save_for_backward(by_slot, weight, a, b, u, factors, keep, b_mask)
        ctx.x_shape, ctx.dtypes = x.shape, (lora_a.dtype, lora_b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_slot, weight, a, b, u, factors, keep, b_mask = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        flat = grad.reshape(-1, grad.shape[-1])  # (slots · tokens, d_out)
        grad = flat.view(*u.shape[:2], flat.shape[-1])  # (slots, tokens, d_out)
        grad_u = grad.bmm(b).mul_(factors[:, None, None]) if needs_x or needs_a else None  # (slots, tokens, rank)
        grad_a = _grad_a(grad_u, by_slot, keep).to(ctx.dtypes[0]) if needs_a else None
        grad_b = _grad_b(grad, u, b_mask).to(ctx.dtypes[1]) if needs_b else None
        grad_x = _add_times_a(flat.mm(weight).view(by_slot.shape), grad_u, a, keep) if needs_x else None
        grad_x = None if grad_x is None else grad_x.view(ctx.x_shape)
        grad_weight = flat.t().mm(by_slot.view(-1, by_slot.shape[-1])) if needs_weight else None
        grad_bias = flat.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


def _seen_by_a(by_slot: Tensor, keep: Tensor | None) -> Tensor:
    return by_slot if keep is None else by_slot * keep


def _grad_a(grad_u: Tensor | None, by_slot: Tensor, keep: Tensor | None) -> Tensor:
    assert grad_u is not None
    return grad_u.mT.bmm(_seen_by_a(by_slot, keep))


def _grad_b(grad: Tensor, u: Tensor, b_mask: Tensor | None) -> Tensor:
    grad_b = grad.mT.bmm(u)
    return grad_b if b_mask is None else grad_b.mul_(b_mask)


def _add_times_a(grad_x: Tensor, grad_u: Tensor | None, a: Tensor, keep: Tensor | None) -> Tensor:
    """Gives grad_x + (dU A) · keep, the product added in place where no mask stands between."""
    assert grad_u is not None
    if keep is None:
        return grad_x.baddbmm_(grad_u, a)
    return grad_x.add_(grad_u.bmm(a).mul_(keep))
