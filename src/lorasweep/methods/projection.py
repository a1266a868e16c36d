"""Adds a random projection of a vector of d numbers to many weights. The method `intrinsic` trains the vector.

The projection is a product of random signs and a Hadamard transform (Ailon and Chazelle 2009, "The fast
Johnson-Lindenstrauss transform"). Its matrix is never built: for D weights, the projection takes about D log d
additions and stores only two random bits per weight.

    P = S H G / √d      for each block of n weights

n is the smallest power of two ≥ d (and at least 8). H is the Hadamard matrix (n × n). S and G are diagonal matrices of
random signs.

Every entry of P is ±1/√d and every row has length 1. So a step of size η in each of the d numbers moves each weight by
about η, for any d. Within whole blocks, the columns are orthogonal.

*Differs* from Fastfood (Le, Sarlós and Smola 2013: H G Π H B with normal G), which arXiv 1804.08838 and 2012.13255 use.
P has one Hadamard transform instead of two, random signs instead of normal numbers, and exactly orthogonal columns. The
papers' columns have length 1, so their learning rates are √(D/d) times ours and depend on d.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

WEIGHTS_PER_CHUNK = 2**18
"""Number of weights that are projected at a time (or one block, if a block is larger), so that temporary tensors stay
in the CPU's cache. It determines the index of each weight in its block, so it is saved with the trained vector."""
SIGNS_PER_BYTE = 8
"""Minimum number of weights in a block, so that the signs of a block fill whole bytes."""


def get_block_size(dim: int) -> int:
    """Returns n, the smallest power of two that is at least `dim` and at least `SIGNS_PER_BYTE`."""
    return max(SIGNS_PER_BYTE, 1 << (dim - 1).bit_length())


def draw_signs(count: int, *, block: int, generator: torch.Generator) -> UInt8[Tensor, " bytes"]:
    """Returns the random signs of the projection into `count` weights as bits: first those of G, then those of S."""
    columns = -(-count // block)
    num_signs = (block + _count_rows(count, block)) * columns
    return torch.randint(0, 256, (num_signs // SIGNS_PER_BYTE,), dtype=torch.uint8, generator=generator)


def apply_hadamard(x: Float[Tensor, "n columns"]) -> Float[Tensor, "n columns"]:
    """Returns H x, computed in log2(n) steps of sums and differences. n must be a power of two.

    H is not normalised: H H = n I.
    """
    size, half = len(x), 1
    while half < size:
        above, below = x.reshape(size // (2 * half), 2, -1).unbind(1)
        x = torch.stack((above + below, above - below), dim=1)
        half *= 2
    return x.reshape(size, -1)


def add_projection(
    base: Float[Tensor, "*shape"], vector: Float[Tensor, " n"], signs: UInt8[Tensor, " bytes"]
) -> Float[Tensor, "*shape"]:
    """Returns base + S H G vector in the shape and dtype of `base`, computed in the wider dtype and rounded once.

    Args:
        base: Weights. Their values do not change.
        vector: The vector to project, divided by √d and padded with zeros to n elements, a power of two.
        signs: Result of `draw_signs` for the number of weights in `base` and for blocks of n.
    """
    result: Tensor = _AddProjection.apply(base, vector, signs)  # type: ignore[no-untyped-call]
    return result


class _AddProjection(torch.autograd.Function):
    """Adds the projection. Backward needs only the signs, because the gradient of a linear map needs no inputs."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, vector: Tensor, signs: Tensor) -> Tensor:
        ctx.save_for_backward(signs)
        ctx.block, ctx.dtype = len(vector), vector.dtype
        flat, weight = base.reshape(-1), torch.empty(base.numel(), dtype=base.dtype, device=base.device)
        for chunk, signs_g, signs_s in _iter_chunks(base.numel(), signs, block=len(vector), dtype=vector.dtype):
            update = signs_s * apply_hadamard(_fold_blocks(signs_g * vector[:, None], rows=len(signs_s)))
            # the last block may be longer than the number of remaining weights
            torch.add(flat[chunk], update.flatten()[: len(flat[chunk])], out=weight[chunk])
        return weight.view(base.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (signs,) = ctx.saved_tensors
        flat, total = grad.reshape(-1), torch.zeros(ctx.block, dtype=ctx.dtype, device=grad.device)
        for chunk, signs_g, signs_s in _iter_chunks(grad.numel(), signs, block=ctx.block, dtype=ctx.dtype):
            padded = pad(flat[chunk], (0, signs_s.numel() - len(flat[chunk]))).view_as(signs_s)
            # the transpose of the forward pass: H is symmetric, and `repeat` is the transpose of `_fold_blocks`
            total += (signs_g * apply_hadamard(signs_s * padded).repeat(len(signs_g) // len(signs_s), 1)).sum(1)
        return grad, total, None


def _count_rows(count: int, block: int) -> int:
    """Returns how many rows of H to compute: n, or a smaller power of two that is enough for fewer weights."""
    return min(block, get_block_size(count))


def _fold_blocks(x: Float[Tensor, "n columns"], *, rows: int) -> Float[Tensor, "rows columns"]:
    """Returns the sum of the blocks of x, whose transform of size `rows` equals the first `rows` rows of H x.

    The first `rows` rows of H are copies of the smaller Hadamard matrix side by side.
    """
    return x if len(x) == rows else x.view(-1, rows, x.shape[1]).sum(0)


def _iter_chunks(
    count: int, signs: Tensor, *, block: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "n columns"], Float[Tensor, "rows columns"]]]:
    """Yields each chunk of weights as a slice of the flat tensor, with the chunk's signs G and S."""
    # both sizes of a chunk are powers of two, so a chunk has whole blocks
    chunk_size, rows = max(block, WEIGHTS_PER_CHUNK), _count_rows(count, block)
    num_bytes_g = block * -(-count // block) // SIGNS_PER_BYTE
    bytes_g, bytes_s = signs[:num_bytes_g], signs[num_bytes_g:]
    for begin in range(0, count, chunk_size):
        chunk = slice(begin, min(begin + chunk_size, count))
        first_block, end_block = begin // block, -(-chunk.stop // block)
        in_bytes_g = slice(block * first_block // SIGNS_PER_BYTE, block * end_block // SIGNS_PER_BYTE)
        in_bytes_s = slice(rows * first_block // SIGNS_PER_BYTE, rows * end_block // SIGNS_PER_BYTE)
        signs_g = _unpack_signs(bytes_g[in_bytes_g], dtype=dtype).view(block, -1)
        signs_s = _unpack_signs(bytes_s[in_bytes_s], dtype=dtype).view(rows, -1)
        yield chunk, signs_g, signs_s


def _unpack_signs(packed: UInt8[Tensor, " bytes"], *, dtype: torch.dtype) -> Float[Tensor, " signs"]:
    bits = (packed[:, None] >> torch.arange(SIGNS_PER_BYTE, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten().to(dtype).mul_(-2).add_(1)
