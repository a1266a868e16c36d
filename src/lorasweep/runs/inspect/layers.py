"""Norms and ranks of each weight that a run changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorasweep.lora.patterns import block_index
from lorasweep.runs.inspect.changes import Change
from lorasweep.runs.inspect.spectrum import Decomposition, effective_rank, energy_rank, stable_rank


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """Norms and ranks of one changed weight; a line of `layers.csv`. Biases and norms have no ranks."""

    layer: str
    block: int | None
    kind: str
    d_out: int
    d_in: int | None
    trained_rank: int | None
    change_norm: float
    """‖ΔW‖_F."""
    base_norm: float
    """‖W0‖_F."""
    norm_share: float
    """‖ΔW‖²_F over that of all weights of the run."""
    effective_rank: float | None
    stable_rank: float | None
    energy_rank: int | None
    amplification: float | None
    """‖ΔW‖_F / ‖Uᵀ W0 V‖_F within the change's own first directions: as many as the trained rank, or as `energy_rank`
    without one (LoRA, section 7.3)."""


def measure_layers(changes: Sequence[Change], decompositions: Mapping[str, Decomposition]) -> tuple[LayerChange, ...]:
    """Returns norms and ranks of each change, in order.

    Args:
        changes: The changes of a run.
        decompositions: The decomposition of each change that is a matrix, by name.
    """
    norms = [torch.linalg.vector_norm(decompositions[c.name].s if c.is_matrix else c.left).item() for c in changes]
    total = sum(norm**2 for norm in norms)
    rows = []
    for change, norm in zip(changes, norms, strict=True):
        parts = decompositions.get(change.name)
        rows.append(
            LayerChange(
                layer=change.name,
                block=block_index(change.name),
                kind=change.kind,
                d_out=change.base.shape[0],
                d_in=change.base.shape[1] if change.is_matrix else None,
                trained_rank=change.rank,
                change_norm=norm,
                base_norm=torch.linalg.vector_norm(change.base.double()).item(),
                norm_share=norm**2 / total if total else 0.0,
                effective_rank=effective_rank(parts.s) if parts else None,
                stable_rank=stable_rank(parts.s) if parts else None,
                energy_rank=energy_rank(parts.s) if parts else None,
                amplification=_amplification(parts, change.base, rank=change.rank) if parts else None,
            )
        )
    return tuple(rows)


def _amplification(change: Decomposition, base: Tensor, *, rank: int | None) -> float | None:
    """Returns LoRA's amplification factor (Table 7); None where the base does nothing in the change's directions."""
    count = min(rank or energy_rank(change.s), len(change.s))
    inside = torch.linalg.matrix_norm(change.u[:, :count].t() @ base.double() @ change.vh[:count].t()).item()
    return torch.linalg.vector_norm(change.s[:count]).item() / inside if inside > 0 else None


def shares_by(rows: Sequence[LayerChange], field: Literal["kind", "block"]) -> dict[Any, float]:
    """Returns the share of the squared norm by kind of layer or by block, the largest first."""
    shares: dict[Any, float] = {}
    for row in rows:
        shares[getattr(row, field)] = shares.get(getattr(row, field), 0.0) + row.norm_share
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def relative_norm(rows: Sequence[LayerChange]) -> float | None:
    """Returns ‖ΔW‖_F / ‖W0‖_F of these weights together; None where W0 is zero."""
    base = sum(row.base_norm**2 for row in rows) ** 0.5
    return sum(row.change_norm**2 for row in rows) ** 0.5 / base if base else None
