"""Singular values and norms of weight updates ΔW, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorasweep.runs.weight_updates import WeightUpdate

ENERGY_FRACTION = 0.9
"""Fraction of the squared norm that `energy_rank` directions hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """A thin singular value decomposition U diag(s) Vᵀ of a matrix (d_out, d_in)."""

    u: Float[Tensor, "d_out n"]
    s: Float[Tensor, " n"]
    """Singular values in descending order."""
    vh: Float[Tensor, "n d_in"]


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """Norms and rank of the update of one weight; a line of `layers.csv`. Biases and norms have no rank."""

    layer: str
    kind: str
    d_out: int
    d_in: int | None
    trained_rank: int | None
    update_norm: float
    """‖ΔW‖_F."""
    base_norm: float
    """‖W0‖_F."""
    norm_share: float
    """‖ΔW‖²_F divided by its sum over all weights of the run."""
    energy_rank: int | None
    amplification: float | None
    """‖ΔW‖_F / ‖Uᵀ W0 V‖_F within the first directions of ΔW (LoRA, section 7.3). Their number is the trained rank, or
    `energy_rank` if LoRA did not train the weight."""


def decompose(left: Float[Tensor, "d_out r"], right: Float[Tensor, "r d_in"] | None = None) -> Decomposition:
    """Returns the decomposition of `left @ right`, or of `left` alone."""
    if right is None:
        u, s, vh = torch.linalg.svd(left.double(), full_matrices=False)
        return Decomposition(u=u, s=s, vh=vh)
    # With left = Q R and rightᵀ = P S, the product has the singular values of the small matrix R Sᵀ. This costs
    # (d_out + d_in) · r² instead of d_out · d_in · min(d_out, d_in), and the product is never computed.
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().t())
    u, s, vh = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    return Decomposition(u=q_left @ u, s=s, vh=vh @ q_right.t())


def energy_rank(s: Float[Tensor, " n"]) -> int:
    """Returns the smallest number of directions that hold 90 % of the squared norm; 0 if all values are zero."""
    if not s.any():
        return 0
    held = (s / s[0]).square().cumsum(0)  # divided by the largest value, so that squares do not underflow
    return int((held < ENERGY_FRACTION * held[-1]).sum().item()) + 1


def measure_layers(
    updates: Sequence[WeightUpdate], decompositions: Mapping[str, Decomposition]
) -> tuple[LayerRow, ...]:
    """Returns a row for each update, in order. `decompositions` has an entry for each update that is a matrix."""
    norms = [torch.linalg.vector_norm(decompositions[u.name].s if u.is_matrix else u.left).item() for u in updates]
    total = sum(norm**2 for norm in norms)
    rows = []
    for update, norm in zip(updates, norms, strict=True):
        parts = decompositions.get(update.name)
        rows.append(
            LayerRow(
                layer=update.name,
                kind=update.kind,
                d_out=update.base.shape[0],
                d_in=update.base.shape[1] if update.is_matrix else None,
                trained_rank=update.rank,
                update_norm=norm,
                base_norm=torch.linalg.vector_norm(update.base.double()).item(),
                norm_share=norm**2 / total if total else 0.0,
                energy_rank=energy_rank(parts.s) if parts else None,
                amplification=_amplification(parts, update.base, rank=update.rank) if parts else None,
            )
        )
    return tuple(rows)


def _amplification(parts: Decomposition, base: Tensor, *, rank: int | None) -> float | None:
    """Returns the amplification factor (LoRA, Table 7); None if W0 is zero in the directions of ΔW."""
    count = min(rank or energy_rank(parts.s), len(parts.s))
    inside = torch.linalg.matrix_norm(parts.u[:, :count].t() @ base.double() @ parts.vh[:count].t()).item()
    return torch.linalg.vector_norm(parts.s[:count]).item() / inside if inside > 0 else None


def relative_norm(rows: Sequence[LayerRow]) -> float | None:
    """Returns ‖ΔW‖_F / ‖W0‖_F of all these weights together; None if W0 is zero."""
    base = sum(row.base_norm**2 for row in rows) ** 0.5
    return sum(row.update_norm**2 for row in rows) ** 0.5 / base if base else None
