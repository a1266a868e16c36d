"""LoRA as functions of tensors: no modules, no state. `layers` calls these.

One autograd function does the work of a linear layer and its change: x is saved once, dY·B is computed once and
nothing of size (tokens, d_out) is made besides the output itself. What is `rank` wide is kept as (rank, tokens): such
products run up to five times faster on a CPU than those of (tokens, rank).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lorasweep.config.method import Scaling

Rows = tuple[tuple[int, int], ...]
"""Row ranges (first, past the last) of a fused projection, one per part that has a change of its own."""


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
    rows: Rows = (),
) -> Tensor:
    """W0 x + b + scaling · B A (x · keep / (1 - dropout)): equation 3 of LoRA (arXiv 2106.09685).

    *Differs:* A and B are cast to the dtype of the base at use, never x to theirs, so that no second copy of x is kept.

    Args:
        x: (..., d_in), in the dtype of `weight` (under autocast: any).
        weight: (d_out, d_in). May be the transposed view of a weight stored the other way round.
        bias: (d_out,) or nothing.
        lora_a: (rank, d_in); with `rows` (parts · rank, d_in).
        lora_b: (d_out, rank); with `rows` (sum of their lengths, rank).
        scaling: Factor on the change, from `scaling_factor`.
        keep: Mask of x's shape, False where the change does not see an input; nothing keeps all.
        dropout: Probability with which `keep` is False.
        rows: Parts of the output that get a change, each from its own A and B; empty for all of it from one.

    Returns:
        (..., d_out) in the dtype of `weight` (under autocast: in autocast's dtype).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    factor = scaling / (1 - dropout) if keep is not None else scaling
    output: Tensor = _LoraLinear.apply(x, weight, bias, lora_a, lora_b, factor, keep, rows)  # type: ignore[no-untyped-call]
    return output


def add_change(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    rows: Rows = (),
) -> Tensor:
    """The output y (..., d_out) of any layer plus scaling · B A (x · keep / (1 - dropout)), in the dtype of y.

    For a base that computes its own output, such as a quantised one; arguments as in `lora_linear`.
    """
    factor = scaling / (1 - dropout) if keep is not None else scaling
    output: Tensor = _AddChange.apply(y, x.to(y.dtype), lora_a, lora_b, factor, keep, rows)  # type: ignore[no-untyped-call]
    return output


def draw_keep_mask(x: Tensor, *, dropout: float, generator: torch.Generator | None = None) -> Tensor:
    """A mask of x's shape that is False with probability `dropout`, from `generator` or torch's own random stream."""
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return mask.bernoulli_(1 - dropout, generator=generator)


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b + (B u)ᵀ with u = factor · A (x · keep)ᵀ; u and not y is scaled, being r wide instead of d_out."""

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
        rows: Rows,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])  # (tokens, d_in)
        keep = None if keep is None else keep.reshape(flat.shape)
        y = linear(flat, weight, bias)  # (tokens, d_out)
        u = a.mm(_seen_by_a(flat, keep).t()).mul_(factor)  # (rank, tokens)
        _add_b_times_u(y, b, u, rows)
        ctx.save_for_backward(flat, weight, a, b, u, keep)
        ctx.factor, ctx.rows, ctx.x_shape, ctx.dtypes = factor, rows, x.shape, (lora_a.dtype, lora_b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, u, keep = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, d_out)
        grad_u = _grad_u(grad, b, ctx.rows).mul_(ctx.factor) if needs_x or needs_a else None  # (rank, tokens)
        grad_a = _grad_a(grad_u, flat, keep).to(ctx.dtypes[0]) if needs_a else None
        grad_b = _grad_b(grad, u, ctx.rows).to(ctx.dtypes[1]) if needs_b else None
        grad_x = _add_grad_through_a(grad.mm(weight), grad_u, a, keep).view(ctx.x_shape) if needs_x else None
        grad_weight = grad.t().mm(flat) if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


class _AddChange(torch.autograd.Function):
    """y + (B u)ᵀ with u as in `_LoraLinear`, for a y that something else has computed and may need."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        factor: float,
        keep: Tensor | None,
        rows: Rows,
    ) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])  # (tokens, d_in)
        keep = None if keep is None else keep.reshape(flat.shape)
        u = a.mm(_seen_by_a(flat, keep).t()).mul_(factor)  # (rank, tokens)
        ctx.save_for_backward(flat, a, b, u, keep)
        ctx.factor, ctx.rows, ctx.x_shape, ctx.dtypes = factor, rows, x.shape, (lora_a.dtype, lora_b.dtype)
        if not rows:
            return torch.addmm(y.reshape(-1, y.shape[-1]), u.t(), b.t()).view(y.shape)
        output = y.clone(memory_format=torch.contiguous_format)
        _add_b_times_u(output.view(-1, y.shape[-1]), b, u, rows)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, a, b, u, keep = ctx.saved_tensors
        needs_y, needs_x, needs_a, needs_b = ctx.needs_input_grad[:4]
        flat_grad = grad.reshape(-1, grad.shape[-1])  # (tokens, d_out)
        grad_u = _grad_u(flat_grad, b, ctx.rows).mul_(ctx.factor) if needs_x or needs_a else None  # (rank, tokens)
        grad_a = _grad_a(grad_u, flat, keep).to(ctx.dtypes[0]) if needs_a else None
        grad_b = _grad_b(flat_grad, u, ctx.rows).to(ctx.dtypes[1]) if needs_b else None
        grad_x = _add_grad_through_a(None, grad_u, a, keep).view(ctx.x_shape) if needs_x else None
        return grad if needs_y else None, grad_x, grad_a, grad_b, None, None, None


def _seen_by_a(flat: Tensor, keep: Tensor | None) -> Tensor:
    return flat if keep is None else flat * keep


def _parts(rows: Rows, b: Tensor) -> list[tuple[slice, Tensor, slice]]:
    """For each part of a fused projection: its columns of y, its B (a view of `b`), its rows of u."""
    rank, start, parts = b.shape[1], 0, []
    for i, (first, past) in enumerate(rows):
        parts.append((slice(first, past), b[start : start + past - first], slice(i * rank, (i + 1) * rank)))
        start += past - first
    return parts


def _add_b_times_u(y: Tensor, b: Tensor, u: Tensor, rows: Rows) -> None:
    """Adds (B u)ᵀ to y (tokens, d_out) in place."""
    if not rows:
        y.addmm_(u.t(), b.t())
        return
    for columns, b_part, of_u in _parts(rows, b):
        y[:, columns].addmm_(u[of_u].t(), b_part.t())


def _grad_u(grad: Tensor, b: Tensor, rows: Rows) -> Tensor:
    """Gives Bᵀ dYᵀ, the gradient of u before scaling (rank, tokens)."""
    if not rows:
        return b.t().mm(grad.t())
    return torch.cat([b_part.t().mm(grad[:, columns].t()) for columns, b_part, _ in _parts(rows, b)])


def _grad_a(grad_u: Tensor | None, flat: Tensor, keep: Tensor | None) -> Tensor:
    assert grad_u is not None
    return grad_u.mm(_seen_by_a(flat, keep))


def _grad_b(grad: Tensor, u: Tensor, rows: Rows) -> Tensor:
    """Gives dYᵀ uᵀ in the shape of B."""
    if not rows:
        return u.mm(grad).t()
    rank = u.shape[0] // len(rows)
    parts = (u[i * rank : (i + 1) * rank].mm(grad[:, first:past]).t() for i, (first, past) in enumerate(rows))
    return torch.cat(list(parts))


def _add_grad_through_a(grad_x: Tensor | None, grad_u: Tensor | None, a: Tensor, keep: Tensor | None) -> Tensor:
    """Gives grad_x + (dUᵀ A) · keep, the product added in place where no mask stands between."""
    assert grad_u is not None
    if grad_x is not None and keep is None:
        return grad_x.addmm_(grad_u.t(), a)
    through_a = grad_u.t().mm(a) if keep is None else grad_u.t().mm(a).mul_(keep)
    return through_a if grad_x is None else grad_x.add_(through_a)
