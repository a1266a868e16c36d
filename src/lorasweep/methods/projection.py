"""A few numbers, projected at random into many weights and added to them; `intrinsic` trains them.

The projection is a product of random signs and Hadamard transforms (Ailon and Chazelle 2009, "The fast
Johnson-Lindenstrauss transform"), so no matrix is ever made: for D weights it takes D log d additions, and two random
bits per weight are what is stored.

    P = S H G / √d      per block of n weights; n is the power of two from d on, H is n × n, S and G are random signs

Every entry is ±1/√d and every row has length 1, so a step of size η in each of the d numbers moves each weight by about
η, whatever d is. Within whole blocks the columns are orthogonal.

*Differs* from Fastfood (Le, Sarlós and Smola 2013), H G Π H B with normal G, which arXiv 1804.08838 and 2012.13255
take: one transform instead of two, a bit where it has a number, and columns that are orthogonal exactly. With columns
of length 1, as there, learning rates would be √(D/d) times ours and so move with d.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

PIECE = 2**18
"""Weights projected at a time (one block, where that is more), so that temporaries stay in a processor's cache. Where a
weight lies in its block depends on it, so it is saved with what was trained."""
BITS = 8
"""Signs per byte, and so the smallest block."""


def block_size(dim: int) -> int:
    """Returns n: the power of two from `dim` on."""
    return max(BITS, 1 << (dim - 1).bit_length())


def draw_signs(count: int, *, block: int, generator: torch.Generator) -> UInt8[Tensor, " bytes"]:
    """Returns the random signs of the projection into `count` weights, eight in a byte: first G, then S."""
    columns = -(-count // block)
    num_signs = (block + _rows(count, block)) * columns
    return torch.randint(0, 256, (num_signs // BITS,), dtype=torch.uint8, generator=generator)


def hadamard(x: Float[Tensor, "n columns"]) -> Float[Tensor, "n columns"]:
    """Returns H x in log2(n) steps of sums and differences; H H = n I. n must be a power of two."""
    size, half = len(x), 1
    while half < size:
        above, below = x.reshape(size // (2 * half), 2, -1).unbind(1)
        x = torch.stack((above + below, above - below), dim=1)
        half *= 2
    return x.reshape(size, -1)


def add_projection(
    base: Float[Tensor, "*shape"], numbers: Float[Tensor, " n"], signs: UInt8[Tensor, " bytes"]
) -> Float[Tensor, "*shape"]:
    """Returns base + S H G numbers, of the base's shape and dtype, computed in the wider dtype and rounded once.

    Args:
        base: Weights; not written to.
        numbers: Of length n, a power of two; where they are d < n, zeros behind them. The factor 1/√d is theirs.
        signs: From `draw_signs` for that many weights and n.
    """
    result: Tensor = _AddProjection.apply(base, numbers, signs)  # type: ignore[no-untyped-call]
    return result


class _AddProjection(torch.autograd.Function):
    """Linear, so that nothing but the signs is kept for the backward pass, which is the transposed product."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, numbers: Tensor, signs: Tensor) -> Tensor:
        ctx.save_for_backward(signs)
        ctx.block, ctx.dtype = len(numbers), numbers.dtype
        start, weight = base.reshape(-1), torch.empty(base.numel(), dtype=base.dtype, device=base.device)
        for part, inner, outer in _pieces(base.numel(), signs, block=len(numbers), dtype=numbers.dtype):
            change = outer * hadamard(_fold(inner * numbers[:, None], rows=len(outer)))
            torch.add(start[part], change.flatten()[: len(start[part])], out=weight[part])
        return weight.view(base.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (signs,) = ctx.saved_tensors
        flat, total = grad.reshape(-1), torch.zeros(ctx.block, dtype=ctx.dtype, device=grad.device)
        for part, inner, outer in _pieces(grad.numel(), signs, block=ctx.block, dtype=ctx.dtype):
            piece = pad(flat[part], (0, outer.numel() - len(flat[part]))).view_as(outer)
            total += (inner * hadamard(outer * piece).repeat(len(inner) // len(outer), 1)).sum(1)
        return grad, total, None


def _rows(count: int, block: int) -> int:
    """Returns how many of H's rows are needed: all, or in a block that the weights don't fill a power of two."""
    return min(block, block_size(count))


def _fold(x: Float[Tensor, "n columns"], *, rows: int) -> Float[Tensor, "rows columns"]:
    """Returns what the smaller transform takes to the first rows of H x: H's first rows repeat themselves."""
    return x if len(x) == rows else x.view(-1, rows, x.shape[1]).sum(0)


def _pieces(
    count: int, signs: Tensor, *, block: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "n columns"], Float[Tensor, "rows columns"]]]:
    """Yields the ranges of weights that are projected at a time, with their signs G and S."""
    size, rows = max(block, PIECE), _rows(count, block)  # powers of two, so blocks are never cut
    cut = block * -(-count // block) // BITS
    inner, outer = signs[:cut], signs[cut:]
    for begin in range(0, count, size):
        part = slice(begin, min(begin + size, count))
        first, last = begin // block, -(-part.stop // block)
        yield (
            part,
            _unpack(inner[block * first // BITS : block * last // BITS], dtype=dtype).view(block, -1),
            _unpack(outer[rows * first // BITS : rows * last // BITS], dtype=dtype).view(rows, -1),
        )


def _unpack(packed: UInt8[Tensor, " bytes"], *, dtype: torch.dtype) -> Float[Tensor, " signs"]:
    bits = (packed[:, None] >> torch.arange(BITS, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten().to(dtype).mul_(-2).add_(1)
