"""How far the top singular directions of two runs' changes are the same: φ of LoRA's section 7.2 (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from lorasweep.runs.inspect.spectrum import Decomposition

GRID = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Numbers of top directions that are compared, as far as both changes have them."""
MEAN = "mean"
"""Stands in place of a layer's name for the mean over layers."""


class Overlap(NamedTuple):
    """φ of the first i directions of one change and the first j of another; a line of `similarity.csv`."""

    layer: str
    i: int
    j: int
    phi: float
    """0: orthogonal; 1: the smaller subspace lies in the larger one."""
    random: float
    """φ of random directions on average: max(i, j) over the dimension."""


def top_directions(decompositions: Mapping[str, Decomposition]) -> dict[str, Tensor]:
    """Returns by layer the first right singular vectors of ΔW, as rows (n, d_in), n <= 64; none where nothing changed.

    *Differs* from the paper, which takes those of A: full fine-tuning has no A. For LoRA both span the same space.
    Directions below the rounding of fp32 are left out.
    """
    found = {}
    for layer, change in decompositions.items():
        used = int((change.s > change.s[:1] * torch.finfo(torch.float32).eps).sum())
        if used:
            found[layer] = change.vh[: min(used, GRID[-1])]
    return found


def compare_subspaces(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[Overlap, ...]:
    """Returns φ of every layer that both runs changed, after the means over layers.

    Args:
        first: The top directions of one run by layer, see `top_directions`.
        second: Those of the other run.
    """
    rows = [row for layer in first if layer in second for row in _compare_layer(layer, first[layer], second[layer])]
    cells: dict[tuple[int, int], list[Overlap]] = {}
    for row in rows:
        cells.setdefault((row.i, row.j), []).append(row)
    means = [
        Overlap(MEAN, i, j, fmean(row.phi for row in found), fmean(row.random for row in found))
        for (i, j), found in sorted(cells.items())
    ]
    return (*means, *rows)


def _compare_layer(layer: str, first: Tensor, second: Tensor) -> list[Overlap]:
    """Returns φ(i, j) = ‖Uᵢᵀ Uⱼ‖²_F / min(i, j) (equation 4) of orthonormal rows (n, d) and (m, d)."""
    sums = ((first @ second.t()) ** 2).cumsum(0).cumsum(1).tolist()  # ‖Uᵢᵀ Uⱼ‖²_F at each (i, j)
    return [
        Overlap(layer, i, j, sums[i - 1][j - 1] / min(i, j), max(i, j) / first.shape[1])
        for i in GRID
        for j in GRID
        if i <= len(first) and j <= len(second)
    ]
