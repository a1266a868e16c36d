"""Projects d numbers at random into many weights and adds the result to them; `intrinsic` trains the numbers.

The projection is a product of random signs and a Hadamard transform (Ailon and Chazelle 2009, "The fast
Johnson-Lindenstrauss transform"), so its matrix is never built: for D weights it takes about D log d additions, and
only two random bits per weight are stored.

    P = S H G / √d      for each block of n weights

n is the smallest power of two ≥ d (and at least 8), H is the Hadamard matrix (n × n), S and G are random signs.

Every entry is ±1/√d and every row has length 1, so a step of size η in each of the d numbers moves each weight by about
η, for any d. Within whole blocks the columns are orthogonal.

*Differs* from Fastfood (Le, Sarlós and Smola 2013), H G Π H B with normal G, which arXiv 1804.08838 and 2012.13255
use: one Hadamard transform instead of two, random signs instead of normal numbers, and exactly orthogonal columns. The
columns there have length 1, so that learning rates are √(D/d) times ours and depend on d.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

WEIGHTS_PER_CHUNK = 2**18
"""Number of weights projected at a time (one block, if a block is larger), so that temporaries stay in the CPU's cache.
It determines each weight's index in its block, so it is saved with the trained numbers."""
SIGNS_PER_BYTE = 8
"""A block has at least this many weights, so that its signs fill whole bytes."""


def block_size(dim: int) -> int:
    """Returns n, the smallest power of two that is at least `dim` and at least `SIGNS_PER_BYTE`."""
    return max(SIGNS_PER_BYTE, 1 << (dim - 1).bit_length())


def draw_signs(count: int, *, block: int, generator: torch.Generator) -> UInt8[Tensor, " bytes"]:
    """Returns the random signs of the projection into `count` weights, eight per byte: first G, then S."""
    columns = -(-count // block)
    num_signs = (block + _num_rows(count, block)) * columns
    return torch.randint(0, 256, (num_signs // SIGNS_PER_BYTE,), dtype=torch.uint8, generator=generator)


def hadamard(x: Float[Tensor, "n columns"]) -> Float[Tensor, "n columns"]:
    """Returns H x, computed in log2(n) steps of sums and differences. n must be a power of two; H H = n I."""
    size, half = len(x), 1
    while half < size:
        above, below = x.reshape(size // (2 * half), 2, -1).unbind(1)
        x = torch.stack((above + below, above - below), dim=1)
        half *= 2
    return x.reshape(size, -1)


def add_projection(
    base: Float[Tensor, "*shape"], numbers: Float[Tensor, " n"], signs: UInt8[Tensor, " bytes"]
) -> Float[Tensor, "*shape"]:
    """Returns base + S H G numbers in the base's shape and dtype, computed in the wider dtype and rounded once.

    Args:
        base: Weights; not written to.
        numbers: The numbers to project, already multiplied by 1/√d and padded with zeros to n, a power of two.
        signs: Result of `draw_signs` for the number of weights in `base` and for n.
    """
    result: Tensor = _AddProjection.apply(base, numbers, signs)  # type: ignore[no-untyped-call]
    return result


class _AddProjection(torch.autograd.Function):
    """Adds the projection, and saves only the signs for backward: the gradient of a linear map needs no inputs."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, numbers: Tensor, signs: Tensor) -> Tensor:
        ctx.save_for_backward(signs)
        ctx.block, ctx.dtype = len(numbers), numbers.dtype
        flat, weight = base.reshape(-1), torch.empty(base.numel(), dtype=base.dtype, device=base.device)
        for chunk, signs_g, signs_s in _chunks(base.numel(), signs, block=len(numbers), dtype=numbers.dtype):
            update = signs_s * hadamard(_fold(signs_g * numbers[:, None], rows=len(signs_s)))
            # the last block may be longer than the weights that are left
            torch.add(flat[chunk], update.flatten()[: len(flat[chunk])], out=weight[chunk])
        return weight.view(base.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (signs,) = ctx.saved_tensors
        flat, total = grad.reshape(-1), torch.zeros(ctx.block, dtype=ctx.dtype, device=grad.device)
        for chunk, signs_g, signs_s in _chunks(grad.numel(), signs, block=ctx.block, dtype=ctx.dtype):
            padded = pad(flat[chunk], (0, signs_s.numel() - len(flat[chunk]))).view_as(signs_s)
            # H is symmetric; `repeat` is the transpose of `_fold`
            total += (signs_g * hadamard(signs_s * padded).repeat(len(signs_g) // len(signs_s), 1)).sum(1)
        return grad, total, None


def _num_rows(count: int, block: int) -> int:
    """Returns the number of rows of H to use: n, or a smaller power of two if the weights fill less than a block."""
    return min(block, block_size(count))


def _fold(x: Float[Tensor, "n columns"], *, rows: int) -> Float[Tensor, "rows columns"]:
    """Returns the vector whose transform of size `rows` equals the first `rows` rows of H x.

    The first `rows` rows of H repeat the smaller Hadamard matrix side by side, so the parts of x can be summed.
    """
    return x if len(x) == rows else x.view(-1, rows, x.shape[1]).sum(0)


def _chunks(
    count: int, signs: Tensor, *, block: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "n columns"], Float[Tensor, "rows columns"]]]:
    """Yields each chunk of weights, as a slice of the flat tensor, with its signs G and S."""
    chunk_size, rows = max(block, WEIGHTS_PER_CHUNK), _num_rows(count, block)  # powers of two: no block is cut
    num_bytes_g = block * -(-count // block) // SIGNS_PER_BYTE
    bytes_g, bytes_s = signs[:num_bytes_g], signs[num_bytes_g:]
    for begin in range(0, count, chunk_size):
        chunk = slice(begin, min(begin + chunk_size, count))
        first_block, end_block = begin // block, -(-chunk.stop // block)
        in_bytes_g = slice(block * first_block // SIGNS_PER_BYTE, block * end_block // SIGNS_PER_BYTE)
        in_bytes_s = slice(rows * first_block // SIGNS_PER_BYTE, rows * end_block // SIGNS_PER_BYTE)
        signs_g = _unpack(bytes_g[in_bytes_g], dtype=dtype).view(block, -1)
        signs_s = _unpack(bytes_s[in_bytes_s], dtype=dtype).view(rows, -1)
        yield chunk, signs_g, signs_s


def _unpack(packed: UInt8[Tensor, " bytes"], *, dtype: torch.dtype) -> Float[Tensor, " signs"]:
    bits = (packed[:, None] >> torch.arange(SIGNS_PER_BYTE, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten().to(dtype).mul_(-2).add_(1)
