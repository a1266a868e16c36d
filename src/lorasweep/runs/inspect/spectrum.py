"""The singular values of a change, and how many directions it really uses. Everything in float64.

`changes` says what a run changed; the decompositions made here go on to `subspaces` and `truncation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ENERGY_SHARE = 0.9
"""Share of the squared norm that `energy_rank` directions hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """A thin singular value decomposition U diag(s) Vᵀ of a matrix (d_out, d_in), in float64."""

    u: Tensor
    """(d_out, n): output directions."""
    s: Tensor
    """(n,): singular values, falling."""
    vh: Tensor
    """(n, d_in): input directions."""

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns B (d_out, k) and A (k, d_in) whose product is the nearest matrix of at most that rank.

        Eckart and Young 1936; the singular values are shared evenly between the two.
        """
        root = self.s[:rank].sqrt()
        return self.u[:, :rank] * root, root[:, None] * self.vh[:rank]


def decompose(left: Tensor, right: Tensor | None = None) -> Decomposition:
    """Returns the decomposition of `left @ right`, or of `left` alone.

    A product is never formed: with left = Q R and rightᵀ = P S the singular values are those of the small R Sᵀ, so a
    change of rank r costs (d_out + d_in) · r² and not d_out · d_in · min(d_out, d_in).

    Args:
        left: (d_out, r), or the whole matrix (d_out, d_in).
        right: (r, d_in).
    """
    if right is None:
        u, s, vh = torch.linalg.svd(left.double(), full_matrices=False)
        return Decomposition(u=u, s=s, vh=vh)
    q_left, r_left = torch.linalg.qr(left.double())  # (d_out, n), (n, r)
    q_right, r_right = torch.linalg.qr(right.double().t())
    u, s, vh = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    return Decomposition(u=q_left @ u, s=s, vh=vh @ q_right.t())


def effective_rank(s: Tensor) -> float:
    """Returns the entropy rank exp(-Σ pᵢ ln pᵢ), pᵢ = sᵢ / Σ s (Roy and Vetterli 2007, equations 2 to 4).

    Between 1 (one direction) and n (n equal ones); 0 where nothing changed.
    """
    total = s.sum()
    if total == 0:
        return 0.0
    return math.exp(torch.special.entr(s / total).sum().item())


def stable_rank(s: Tensor) -> float:
    """Returns ‖·‖²_F / ‖·‖²₂, the squared norm over that of the largest direction (Rudelson and Vershynin 2007).

    Between 1 and n; 0 where nothing changed.
    """
    relative = _relative(s)
    return (relative**2).sum().item() if len(relative) else 0.0


def energy_rank(s: Tensor, *, share: float = ENERGY_SHARE) -> int:
    """Returns the smallest number of directions that hold this share of the squared norm; 0 where nothing changed."""
    held = (_relative(s) ** 2).cumsum(0)
    return int((held < share * held[-1]).sum().item()) + 1 if len(held) else 0


def _relative(s: Tensor) -> Tensor:
    """Falling values over the first, so that their squares are in range; none where all are zero."""
    return s / s[0] if len(s) and s[0] > 0 else s[:0]


def largest_values(matrix: Tensor, count: int) -> Tensor:
    """Returns the `count` largest singular values of a matrix, falling, in float64.

    They are the roots of the eigenvalues of M Mᵀ or Mᵀ M, whichever is smaller: several times faster than a
    decomposition and as exact for large values. Those below 10⁻⁸ of the largest are noise.
    """
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.t()
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.t())
    return squares.flip(0)[:count].clamp(min=0).sqrt()
