"""LoRA as functions of tensors: no modules, no state. `layers` calls these.

One autograd function does the work of a linear layer and its change, so that x is saved once, dY·B is computed once and
nothing of size (tokens, d_out) is made besides the output itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lorasweep.config.method import Scaling


def scaling_factor(*, alpha: float, rank: int, rule: Scaling) -> float:
    """The factor on B A x: α/r (LoRA, arXiv 2106.09685, section 4.1) or α/√r (rsLoRA, arXiv 2312.03732, section 3)."""
    return alpha / rank if rule == "alpha_over_rank" else alpha / math.sqrt(rank)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    keep: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """W0 x + b + scaling · B A (x · keep / (1 - dropout)): equation 3 of LoRA (arXiv 2106.09685).

    *Differs:* A and B are cast to the dtype of the base at use, never x to theirs, so that no second copy of x is kept.

    Args:
        x: (..., d_in), in the dtype of `weight` (under autocast: any).
        weight: (d_out, d_in). May be the transposed view of a weight stored the other way round.
        bias: (d_out,) or nothing.
        lora_a: (rank, d_in).
        lora_b: (d_out, rank).
        scaling: Factor on the change, from `scaling_factor`.
        keep: Mask of x's shape, False where the change does not see an input; nothing keeps all.
        dropout: Probability with which `keep` is False.

    Returns:
        (..., d_out) in the dtype of `weight` (under autocast: in autocast's dtype).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    factor = scaling / (1 - dropout) if keep is not None else scaling
    output: Tensor = _LoraLinear.apply(x, weight, bias, lora_a, lora_b, factor, keep)  # type: ignore[no-untyped-call]
    return output


def draw_keep_mask(x: Tensor, *, dropout: float, generator: torch.Generator | None = None) -> Tensor:
    """A mask of x's shape that is False with probability `dropout`, from `generator` or torch's own random stream."""
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return mask.bernoulli_(1 - dropout, generator=generator)


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b + u Bᵀ with u = factor · (x · keep) Aᵀ; u and not y is scaled, being r wide instead of d_out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        factor: float,
        keep: Tensor | None,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])  # (tokens, d_in)
        keep = None if keep is None else keep.reshape(rows.shape)
        y = linear(rows, weight, bias)  # (tokens, d_out)
        u = _seen_by_a(rows, keep).mm(a.t()).mul_(factor)  # (tokens, rank)
        y.addmm_(u, b.t())
        ctx.save_for_backward(rows, weight, a, b, u, keep)
        ctx.factor, ctx.x_shape, ctx.dtypes = factor, x.shape, (lora_a.dtype, lora_b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, u, keep = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, d_out)
        grad_u = grad.mm(b).mul_(ctx.factor) if needs_x or needs_a else None  # (tokens, rank)
        grad_a = grad_u.t().mm(_seen_by_a(rows, keep)).to(ctx.dtypes[0]) if needs_a and grad_u is not None else None
        grad_b = grad.t().mm(u).to(ctx.dtypes[1]) if needs_b else None
        grad_x = _input_gradient(grad, weight, grad_u, a, keep).view(ctx.x_shape) if needs_x else None
        grad_weight = grad.t().mm(rows) if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None


def _seen_by_a(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows if keep is None else rows * keep


def _input_gradient(grad: Tensor, weight: Tensor, grad_u: Tensor | None, a: Tensor, keep: Tensor | None) -> Tensor:
    """Give dX = dY W + (dU A) · keep, the second product added into the first where no mask stands between them."""
    assert grad_u is not None
    grad_x = grad.mm(weight)
    return grad_x.addmm_(grad_u, a) if keep is None else grad_x.add_(grad_u.mm(a).mul_(keep))
