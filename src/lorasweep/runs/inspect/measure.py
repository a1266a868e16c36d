"""A trained model's changes in numbers: one row per changed weight, and the directions that comparisons look at.

Comes after `changes`, `spectrum` and `subspaces`; before `inspect`, which puts a run's numbers together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, get_args

import torch
from torch import Tensor

from lorasweep.runs.inspect.changes import Change
from lorasweep.runs.inspect.spectrum import Decomposition, decompose, effective_rank, energy_rank, stable_rank
from lorasweep.runs.inspect.subspaces import GRID, Similarity, amplification, random_similarity, similarity

Side = Literal["a", "input", "output"]
"""Which directions of a change: right singular vectors of LoRA's A as it was trained (LoRA, section 7.2), of ΔW (the
inputs it reacts to), or left singular vectors of ΔW (what it writes)."""
Directions = Mapping[Side, Tensor]
"""By side, the leading directions as orthonormal rows (n, d), n <= 64."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One changed weight; a line of `layers.csv`. What only a matrix has is None for biases and norms."""

    layer: str
    block: int | None
    kind: str
    d_out: int
    d_in: int | None
    trained_rank: int | None
    """None where there was none."""
    change_norm: float
    """‖ΔW‖_F."""
    base_norm: float
    """‖W0‖_F."""
    relative_norm: float | None
    """‖ΔW‖_F / ‖W0‖_F; None where W0 is zero."""
    norm_share: float
    """Share of the run's squared norm Σ ‖ΔW‖²_F."""
    change_spectral_norm: float | None = None
    """‖ΔW‖₂, the largest singular value."""
    base_spectral_norm: float | None = None
    effective_rank: float | None = None
    """Entropy rank, see `spectrum.effective_rank`."""
    stable_rank: float | None = None
    """‖ΔW‖²_F / ‖ΔW‖²₂."""
    energy_rank: int | None = None
    """Directions that hold 90 % of the squared norm."""
    amplification_rank: int | None = None
    """Directions looked at: the trained rank, or `energy_rank` where there was none."""
    base_in_change: float | None = None
    """‖Uᵀ W0 V‖_F in them; `base_in_own` and `base_in_random` the same in W0's own first ones and in random ones."""
    base_in_own: float | None = None
    base_in_random: float | None = None
    amplification: float | None = None
    """‖ΔW‖_F in them over `base_in_change`."""


def decompose_changes(changes: Sequence[Change]) -> dict[str, Decomposition]:
    """Returns the decomposition of every changed matrix, by name."""
    return {change.name: change.decomposed() for change in changes if change.is_matrix}


def measure_layers(changes: Sequence[Change], decompositions: Mapping[str, Decomposition]) -> tuple[LayerRow, ...]:
    """Returns a row for each change, in order."""
    norms = [_norm_of(change, decompositions) for change in changes]
    total = sum(norm**2 for norm in norms)
    return tuple(
        _measure(change, norm, norm**2 / total if total else 0.0, decompositions.get(change.name))
        for change, norm in zip(changes, norms, strict=True)
    )


def leading_directions(changes: Sequence[Change], decompositions: Mapping[str, Decomposition]) -> dict[str, Directions]:
    """Returns the directions of every matrix that changed, by name; those below the noise of fp32 left out."""
    found: dict[str, Directions] = {}
    for change in changes:
        parts = decompositions.get(change.name)
        used = int((parts.s > parts.s[0] * torch.finfo(torch.float32).eps).sum()) if parts else 0
        if parts is None or not used:
            continue
        count = min(used, GRID[-1])
        sides: dict[Side, Tensor] = {"input": parts.vh[:count], "output": parts.u[:, :count].t()}
        if change.lora_a is not None:
            sides = {"a": decompose(change.lora_a).vh[: GRID[-1]], **sides}
        found[change.name] = sides
    return found


def compare_directions(
    first: Mapping[str, Directions], second: Mapping[str, Directions]
) -> dict[tuple[str, Side], Similarity]:
    """Returns φ for each layer and side that both have."""
    return {
        (name, side): similarity(first[name][side], second[name][side])
        for name in first
        if name in second
        for side in get_args(Side)
        if side in first[name] and side in second[name]
    }


def mean_similarity(
    values: Mapping[tuple[str, Side], Similarity], side: Side
) -> dict[tuple[int, int], tuple[float, float]]:
    """Returns by (i, j) the mean of φ, and of what random directions would have, over the layers that have so many."""
    cells: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for (_, own), found in values.items():
        if own == side:
            for i, j, value in found.cells():
                cells.setdefault((i, j), []).append((value, random_similarity(i, j, found.dimension)))
    return {cell: (fmean(v for v, _ in pairs), fmean(r for _, r in pairs)) for cell, pairs in sorted(cells.items())}


def _norm_of(change: Change, decompositions: Mapping[str, Decomposition]) -> float:
    parts = decompositions.get(change.name)
    return float(torch.linalg.vector_norm(change.left if parts is None else parts.s))


def _measure(change: Change, norm: float, share: float, parts: Decomposition | None) -> LayerRow:
    base_norm = torch.linalg.vector_norm(change.base.double()).item()
    row = LayerRow(
        layer=change.name,
        block=change.block,
        kind=change.kind,
        d_out=change.base.shape[0],
        d_in=change.base.shape[1] if change.is_matrix else None,
        trained_rank=change.rank,
        change_norm=norm,
        base_norm=base_norm,
        relative_norm=norm / base_norm if base_norm else None,
        norm_share=share,
    )
    return row if parts is None else _with_spectrum(row, change, parts)


def _with_spectrum(row: LayerRow, change: Change, parts: Decomposition) -> LayerRow:
    held = energy_rank(parts.s)
    looked_at = min(change.rank or held, len(parts.s))
    found = amplification(parts, change.base, rank=looked_at)
    return replace(
        row,
        change_spectral_norm=parts.s[0].item(),
        base_spectral_norm=found.base_spectral_norm,
        effective_rank=effective_rank(parts.s),
        stable_rank=stable_rank(parts.s),
        energy_rank=held,
        amplification_rank=looked_at,
        base_in_change=found.base_in_change,
        base_in_own=found.base_in_own,
        base_in_random=found.base_in_random,
        amplification=found.factor,
    )
