"""Decompositions and ranks against numpy's on the dense matrix, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.runs.inspect.spectrum import decompose, effective_rank, energy_rank, stable_rank

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


def test_decomposition_of_a_matrix_is_numpys():
    matrix = draw(7, 4)
    np.testing.assert_allclose(decompose(matrix).s, np.linalg.svd(matrix.numpy(), compute_uv=False), rtol=1e-12)


@pytest.mark.parametrize("planted", [1, 3, 8])
def test_a_planted_rank_is_found(planted):
    rotation_out, rotation_in = torch.linalg.qr(draw(40, planted))[0], torch.linalg.qr(draw(30, planted, seed=1))[0]
    found = decompose(rotation_out @ rotation_in.t())  # `planted` equal directions
    assert effective_rank(found.s) == pytest.approx(planted, abs=1e-9)  # rounding of the 30 - planted others
    assert stable_rank(found.s) == pytest.approx(planted, abs=1e-12)
    assert energy_rank(found.s) == math.ceil(0.9 * planted)


def test_effective_rank_is_the_exponential_of_the_entropy():
    values = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    assert effective_rank(values) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


@given(st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=12))
def test_ranks_lie_between_one_and_the_number_of_directions_that_are_used(values):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    used = int((s > 0).sum())
    for rank in (effective_rank(s), stable_rank(s), energy_rank(s)):
        assert (1 - 1e-9 if used else 0) <= rank <= used + 1e-9  # rounding of logarithms


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.floats(0.01, 100))
def test_ranks_do_not_depend_on_the_scale(values, factor):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assert effective_rank(factor * s) == pytest.approx(effective_rank(s), rel=1e-9)
    assert stable_rank(factor * s) == pytest.approx(stable_rank(s), rel=1e-9)


def test_nothing_changed_has_rank_zero():
    zero = decompose(torch.zeros(4, 2), draw(2, 5)).s
    assert (effective_rank(zero), stable_rank(zero), energy_rank(zero)) == (0, 0, 0)


@pytest.mark.parametrize("rank", [0, 1, 3, 5, 9])
def test_a_truncated_product_is_the_nearest_of_that_rank(rank):
    matrix = draw(9, 5)
    lora_b, lora_a = decompose(matrix).truncated(rank)
    assert lora_b.shape == (9, min(rank, 5))
    left = np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:]
    # Eckart and Young: what is left out is exactly the norm of the smaller singular values
    assert torch.linalg.matrix_norm(matrix - lora_b @ lora_a).item() == pytest.approx(
        float(np.sqrt((left**2).sum())), abs=1e-12
    )
