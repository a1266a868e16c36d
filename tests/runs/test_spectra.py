"""Decompositions, norms and ranks against numpy, known values and the definitions, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.runs.weight_updates import (
    WeightUpdate,
    decompose,
    energy_rank,
    measure_layers,
    read_weight_updates,
    relative_norm,
)

from .conftest import decompose_updates, lora

EXACT = {"rtol": 0, "atol": 1e-12}
"""float64 rounding of sums of some dozens of products of numbers of size 1."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(d_out=st.integers(1, 12), d_in=st.integers(1, 12), rank=st.integers(1, 14), seed=st.integers(0, 99))
def test_decomposition_of_a_product_is_that_of_the_dense_matrix(d_out, d_in, rank, seed):
    left, right = draw(d_out, rank, seed=seed), draw(rank, d_in, seed=seed + 100)
    found = decompose(left, right)
    expected = np.linalg.svd((left @ right).numpy(), compute_uv=False)
    count = len(found.s)
    np.testing.assert_allclose(found.s.numpy(), expected[:count], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(expected[count:], 0, atol=1e-12)
    torch.testing.assert_close(found.u * found.s @ found.vh, left @ right, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.u.t() @ found.u, torch.eye(count).double(), **EXACT)
    torch.testing.assert_close(found.vh @ found.vh.t(), torch.eye(count).double(), **EXACT)


@pytest.mark.parametrize("planted", [1, 3, 8])
def test_a_planted_rank_is_found(planted):
    rotation_out, rotation_in = torch.linalg.qr(draw(40, planted))[0], torch.linalg.qr(draw(30, planted, seed=1))[0]
    found = decompose(rotation_out @ rotation_in.t())  # `planted` equal directions
    assert energy_rank(found.s) == math.ceil(0.9 * planted)


def measure(updates):
    return measure_layers(updates, decompose_updates(updates))


def make_update(name, left, base):
    return WeightUpdate(name=name, base=base, left=left)


def test_a_row_has_the_norms_ranks_and_share_of_its_change():
    diagonal = torch.diag(torch.tensor([3.0, 4.0, 0.0]))
    changes = [
        make_update("blocks.1.proj", diagonal, 2 * torch.eye(3)),
        make_update("blocks.1.proj.bias", torch.tensor([0.0, 5.0]), torch.tensor([3.0, 4.0])),
    ]
    matrix, vector = measure(changes)
    assert (matrix.layer, matrix.kind, matrix.d_out, matrix.d_in) == ("blocks.1.proj", "proj", 3, 3)
    assert matrix.update_norm == pytest.approx(5)
    assert matrix.base_norm == pytest.approx(2 * 3**0.5)
    assert relative_norm([matrix, vector]) == pytest.approx((50 / 37) ** 0.5)
    assert matrix.energy_rank == 2  # the first holds 64 %
    assert matrix.amplification == pytest.approx(5 / 8**0.5)
    assert matrix.norm_share == vector.norm_share == pytest.approx(0.5)
    assert (vector.update_norm, vector.base_norm, vector.d_in) == (5, 5, None)
    assert (vector.energy_rank, vector.amplification, vector.trained_rank) == (None, None, None)


def test_lora_is_amplified_over_its_trained_rank_as_in_the_paper(base, trained):
    changes = read_weight_updates(trained(lora(rank=3)), base.model)
    for change, row in zip(changes, measure(changes), strict=True):
        dense = (change.left @ change.right.double()).detach()
        u, _, vh = torch.linalg.svd(dense)
        inside = u[:, :3].t() @ change.base.double() @ vh[:3].t()
        assert row.amplification == pytest.approx((dense.norm() / inside.norm()).item(), rel=1e-6)
