"""LoRA as functions of tensors, without modules or state. Single runs and packs call the same functions.

The rows of x are slot-major: the first rows belong to slot 0, the next rows to slot 1, and so on. The rows of slot k
are multiplied by A and B of slot k only. A single run is a pack of one slot. Neighbouring slots of similar rank
form a group, whose products are computed together.

The product A x has the shape (slots, rank, tokens). On a CPU this is up to five times faster than the shape
(slots, tokens, rank).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lorasweep.lora.dropout import apply_keep_mask, cast_keep_mask


class SlotGroup(NamedTuple):
    """The weight updates of neighbouring slots. A lower rank is padded with zeros to the highest of the group."""

    lora_a: Float[Tensor, "slots rank d_in"]
    lora_b: Float[Tensor, "slots d_out rank"]
    """B · scaling, divided by (1 - dropout) if inputs are dropped. B has far fewer numbers to multiply than B A x."""


def lora_linear(
    x: Float[Tensor, "*rows d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    groups: Sequence[SlotGroup],
    *,
    keep: Bool[Tensor, "*rows d_in"] | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """Returns W0 x + b + B A (x · keep): equation 3 of LoRA (arXiv 2106.09685) for the rows of each slot.

    x and the output have the dtype of `weight`; under autocast, x has any dtype and the output that of autocast. A and
    B may have any dtype, which their gradients have too. `keep` is False for each input that is dropped before A.

    *Differs* from PEFT: A and B are cast to the dtype of x. PEFT casts x to the dtype of A and so keeps a second copy.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    matrices = [matrix for group in groups for matrix in (group.lora_a, group.lora_b)]
    cast = [matrix.detach().to(x.dtype) for matrix in matrices]
    output: Tensor = _LoraLinear.apply(x, weight, bias, keep, cast, *matrices)  # type: ignore[no-untyped-call]
    return output


def linear_update(
    x: Float[Tensor, "*rows d_in"], group: SlotGroup, *, keep: Bool[Tensor, "*rows d_in"] | None = None
) -> Float[Tensor, "*rows d_out"]:
    """Returns B A (x · keep), without the base's output, for the rows of one group."""
    a, b = group.lora_a.to(x.dtype), group.lora_b.to(x.dtype)
    u = a @ _split_by_slot(x if keep is None else apply_keep_mask(x, keep), len(a)).mT  # (slots, rank, tokens)
    return (u.mT @ b.mT).view(*x.shape[:-1], b.shape[1])


def split_by_group(x: Tensor, groups: Sequence[SlotGroup]) -> tuple[Tensor, ...]:
    """Returns the rows of each group of slots."""
    sizes = [len(group.lora_a) for group in groups]
    return torch.split(x, [len(x) // sum(sizes) * size for size in sizes])


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b over all rows, then y_k += (B_k u_k)ᵀ with u_k = A_k (x_k · keep_k)ᵀ for each slot.

    It saves memory and time in two ways. Backward keeps x itself and no copy, so layers with the same input share it.
    The updates are added to y in place.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        # Named parameters before `*matrices` get wrong values if torch.compile runs in inference mode (torch 2.13).
        x, weight, bias, keep, cast, *matrices = arguments
        by_slot = _split_by_slot(x, sum(map(len, cast[::2])))  # (slots, tokens, d_in)
        keep = None if keep is None else keep.reshape(by_slot.shape)
        dropped = by_slot if keep is None else apply_keep_mask(by_slot, keep)  # of all groups at once
        y = linear(by_slot.flatten(0, 1), weight, bias)  # (slots · tokens, d_out)
        y_by_slot = y.view(*by_slot.shape[:2], y.shape[-1])
        products = []
        for slots, a, b in _iter_groups(cast):
            u = a.bmm(dropped[slots].mT)  # (slots, rank, tokens)
            y_by_slot[slots].baddbmm_(u.mT, b.mT)  # in place, because no other code has a reference to y yet
            products.append(u)
        ctx.save_for_backward(x, weight, keep, *cast, *products)
        ctx.dtypes = [matrix.dtype for matrix in matrices]
        output: Tensor = y.view(*x.shape[:-1], y.shape[-1])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, keep, *saved = ctx.saved_tensors
        cast, products = saved[: len(ctx.dtypes)], saved[len(ctx.dtypes) :]
        by_slot = _split_by_slot(x, sum(map(len, cast[::2])))
        needs_x, needs_weight, needs_bias, _, _, *needs_matrix = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])  # (slots · tokens, d_out)
        grad = flat.view(*by_slot.shape[:2], flat.shape[-1])  # (slots, tokens, d_out)
        grad_x = flat.mm(weight).view(by_slot.shape) if needs_x else None
        dropped, grad_dropped = by_slot, None
        if keep is not None:
            keep = cast_keep_mask(keep, by_slot)
            dropped = apply_keep_mask(by_slot, keep) if any(needs_matrix[::2]) else by_slot
            grad_dropped = torch.empty_like(by_slot) if needs_x else None
        grad_matrices: list[Tensor | None] = []
        for index, (slots, a, b) in enumerate(_iter_groups(cast)):
            needs_a, needs_b = needs_matrix[2 * index : 2 * index + 2]
            grad_a = grad_b = None
            if needs_x or needs_a:
                grad_u = b.mT.bmm(grad[slots].mT)  # (slots, rank, tokens)
            if needs_a:
                grad_a = grad_u.bmm(dropped[slots]).to(ctx.dtypes[2 * index])
            if needs_b:
                grad_b = products[index].bmm(grad[slots]).mT.to(ctx.dtypes[2 * index + 1])
            if grad_dropped is not None:
                torch.bmm(grad_u.mT, a, out=grad_dropped[slots])
            elif grad_x is not None:
                grad_x[slots].baddbmm_(grad_u.mT, a)  # in place, without a temporary tensor of x's size
            grad_matrices += [grad_a, grad_b]
        if grad_x is not None and grad_dropped is not None:
            grad_x.add_(apply_keep_mask(grad_dropped, keep))
        grad_weight = flat.t().mm(by_slot.flatten(0, 1)) if needs_weight else None
        grad_bias = flat.sum(0) if needs_bias else None
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_x, grad_weight, grad_bias, None, None, *grad_matrices


def _split_by_slot(x: Tensor, slots: int) -> Tensor:
    """Returns (slots · rows, ..., width) as (slots, tokens, width)."""
    return x.reshape(slots, x.shape[:-1].numel() // slots, x.shape[-1])


def _iter_groups(matrices: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields the slots of each group, with its A and its B."""
    first = 0
    for a, b in zip(matrices[::2], matrices[1::2], strict=True):
        yield slice(first, first + len(a)), a, b
        first += len(a)
