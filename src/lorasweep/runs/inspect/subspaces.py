"""How far two changes share their directions, and what a change does to directions that the base has (LoRA, section 7).

Comes after `spectrum`. The LoRA paper is arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasweep.runs.inspect.spectrum import Decomposition, largest_values

GRID = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Numbers of directions that are compared, as far as both changes have them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Similarity:
    """φ between the first i directions of one change and the first j of another."""

    rows: tuple[int, ...]
    """The i."""
    columns: tuple[int, ...]
    """The j."""
    values: Tensor
    """(rows, columns), each 0 (orthogonal) to 1 (one contains the other)."""
    dimension: int
    """Of the space in which the directions lie."""

    def cells(self) -> Iterator[tuple[int, int, float]]:
        """Yields i, j and φ."""
        for i, row in zip(self.rows, self.values.tolist(), strict=True):
            for j, value in zip(self.columns, row, strict=True):
                yield i, j, value


def similarity(first: Tensor, second: Tensor) -> Similarity:
    """Returns φ(i, j) = ‖Uᵢᵀ Uⱼ‖²_F / min(i, j) (LoRA, section 7.2, equation 4) over a grid of i and j.

    Args:
        first: (n, d): directions as orthonormal rows, the most important first.
        second: (m, d): those of the other change.
    """
    rows = tuple(i for i in GRID if i <= len(first))
    columns = tuple(j for j in GRID if j <= len(second))
    products = first[: max(rows, default=0)] @ second[: max(columns, default=0)].t()
    sums = (products**2).cumsum(0).cumsum(1)  # ‖Uᵢᵀ Uⱼ‖²_F at each (i, j)
    chosen = sums[[i - 1 for i in rows]][:, [j - 1 for j in columns]]
    smaller = torch.minimum(torch.tensor(rows)[:, None], torch.tensor(columns)[None, :])
    return Similarity(rows=rows, columns=columns, values=chosen / smaller, dimension=first.shape[1])


def random_similarity(i: int, j: int, dimension: int) -> float:
    """Returns what φ(i, j) is on average for random directions in so many dimensions: max(i, j) / dimension."""
    return max(i, j) / dimension


@dataclass(frozen=True, kw_only=True)
class Amplification:
    """What a change does to the base within the change's own directions (LoRA, section 7.3, Table 7)."""

    rank: int
    """r: so many directions of the change are looked at."""
    change_norm: float
    """‖ΔW‖_F within them."""
    base_in_change: float
    """‖Uᵀ W0 V‖_F for the change's first r output and input directions: what the base does there."""
    base_in_own: float
    """The same for the base's own first r directions."""
    base_in_random: float
    """The same for random ones: the root mean square, r ‖W0‖_F / √(d_out · d_in)."""
    base_spectral_norm: float
    """‖W0‖₂."""

    @property
    def factor(self) -> float | None:
        """‖ΔW‖_F / ‖Uᵀ W0 V‖_F; None where the base does nothing there."""
        return self.change_norm / self.base_in_change if self.base_in_change > 0 else None


def amplification(change: Decomposition, base: Tensor, *, rank: int) -> Amplification:
    """Returns the amplification of the change's first `rank` directions.

    *Differs* from Table 7 in the random column, which is the root mean square instead of one draw: for its
    12288 × 12288 matrix of norm 61.95 that is 0.02 at r = 4 and 0.32 at r = 64, where the table has 0.02 and 0.33.

    Args:
        change: Decomposition of ΔW.
        base: W0 (d_out, d_in).
        rank: r, at most as many as the change has.
    """
    wide = base.double()
    own = largest_values(wide, max(rank, 1))
    inside = change.u[:, :rank].t() @ wide @ change.vh[:rank].t()  # (rank, rank)
    return Amplification(
        rank=rank,
        change_norm=torch.linalg.vector_norm(change.s[:rank]).item(),
        base_in_change=torch.linalg.matrix_norm(inside).item(),
        base_in_own=torch.linalg.vector_norm(own[:rank]).item(),
        base_in_random=rank * torch.linalg.matrix_norm(wide).item() / math.sqrt(wide.numel()),
        base_spectral_norm=own[0].item(),
    )
