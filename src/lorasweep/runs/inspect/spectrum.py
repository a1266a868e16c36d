"""Singular values of a change ΔW and how many directions it uses, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ENERGY_FRACTION = 0.9
"""Fraction of the squared norm that `energy_rank` directions hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """A thin singular value decomposition U diag(s) Vᵀ of a matrix (d_out, d_in), in float64."""

    u: Tensor
    """Output directions, (d_out, n)."""
    s: Tensor
    """Singular values in descending order, (n,)."""
    vh: Tensor
    """Input directions, (n, d_in)."""

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns B (d_out, k) and A (k, d_in), k <= rank. Their product is the nearest matrix of that rank.

        Eckart and Young 1936. B and A each take the square root of the singular values.
        """
        root = self.s[:rank].sqrt()
        return self.u[:, :rank] * root, root[:, None] * self.vh[:rank]


def decompose(left: Tensor, right: Tensor | None = None) -> Decomposition:
    """Returns the decomposition of `left @ right`, or of `left` alone.

    The product is not computed. With left = Q R and rightᵀ = P S its singular values are those of the small matrix
    R Sᵀ, so a change of rank r costs (d_out + d_in) · r² instead of d_out · d_in · min(d_out, d_in).

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

    It lies between 1 (one direction) and n (n equal directions); it is 0 where nothing changed.
    """
    total = s.sum()
    return math.exp(torch.special.entr(s / total).sum().item()) if total > 0 else 0.0


def stable_rank(s: Tensor) -> float:
    """Returns ‖·‖²_F / ‖·‖²₂, the squared norm over that of the largest direction (Rudelson and Vershynin 2007).

    It lies between 1 and n; it is 0 where nothing changed.
    """
    return (_relative(s) ** 2).sum().item()


def energy_rank(s: Tensor) -> int:
    """Returns the smallest number of directions that hold 90 % of the squared norm; 0 where nothing changed."""
    held = (_relative(s) ** 2).cumsum(0)
    return int((held < ENERGY_FRACTION * held[-1]).sum().item()) + 1 if len(held) else 0


def _relative(s: Tensor) -> Tensor:
    """Returns singular values over the largest one, so that squares do not underflow; none where all are zero."""
    return s / s[0] if len(s) and s[0] > 0 else s[:0]
