"""φ and amplification at their ends, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.runs.inspect.spectrum import decompose
from lorasweep.runs.inspect.subspaces import GRID, amplification, random_similarity, similarity


def draw_directions(count: int, dimension: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimension, count, generator=generator, dtype=torch.float64))[0].t()


def test_a_subspace_is_wholly_similar_to_itself():
    directions = draw_directions(12, 20)
    found = similarity(directions, directions)
    assert found.rows == found.columns == (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)
    # the smaller set lies within the larger one everywhere
    torch.testing.assert_close(found.values, torch.ones(10, 10).double(), rtol=0, atol=1e-12)


def test_orthogonal_subspaces_are_not_similar():
    rotation = draw_directions(10, 10)
    found = similarity(rotation[:4], rotation[4:])
    assert found.values.shape == (4, 6)
    torch.testing.assert_close(found.values, torch.zeros(4, 6).double(), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 50))
def test_similarity_is_its_definition_and_between_zero_and_one(n, m, seed):
    first, second = draw_directions(n, 9, seed=seed), draw_directions(m, 9, seed=seed + 1000)
    for i, j, value in similarity(first, second).cells():
        expected = torch.linalg.matrix_norm(first[:i] @ second[:j].t()) ** 2 / min(i, j)
        assert value == pytest.approx(expected.item(), abs=1e-12)
        assert -1e-12 <= value <= 1 + 1e-12


def test_similarity_does_not_depend_on_signs_and_swaps_with_its_arguments():
    first, second = draw_directions(5, 8), draw_directions(3, 8, seed=1)
    there, back = similarity(first, -second).values, similarity(second, first).values
    torch.testing.assert_close(there, back.t())


def test_random_directions_are_as_similar_as_is_said():
    found = [similarity(draw_directions(8, 40, seed=s), draw_directions(4, 40, seed=s + 500)) for s in range(200)]
    means = torch.stack([one.values for one in found]).mean(0)
    for row, i in enumerate(found[0].rows):
        for column, j in enumerate(found[0].columns):
            # four standard errors of a mean over 200 draws; one draw of φ(1, 1) has deviation √2 / 40
            assert means[row, column].item() == pytest.approx(
                random_similarity(i, j, 40), abs=4 * math.sqrt(2 / 200) / 40
            )


def test_the_grid_ends_where_one_side_ends():
    found = similarity(draw_directions(64, 70), draw_directions(9, 70, seed=1))
    assert found.rows == GRID
    assert found.columns == (1, 2, 3, 4, 5, 6, 7, 8)


def test_amplification_of_a_change_along_the_base_is_the_ratio_of_their_values():
    base = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64))
    change = torch.zeros(4, 4, dtype=torch.float64)
    change[2, 2], change[3, 3] = 6.0, 5.0
    found = amplification(decompose(change), base, rank=2)
    assert found.change_norm == pytest.approx(math.sqrt(61))
    assert found.base_in_change == pytest.approx(math.sqrt(5))
    assert found.base_in_own == pytest.approx(math.sqrt(80))
    assert found.factor == pytest.approx(math.sqrt(61 / 5))
    assert found.base_spectral_norm == pytest.approx(8)
    assert amplification(decompose(change), base, rank=1).factor == pytest.approx(3)


def test_a_change_where_the_base_does_nothing_has_no_factor():
    base, change = torch.zeros(3, 3), torch.zeros(3, 3)
    base[0, 0], change[1, 1] = 2.0, 1.0
    assert amplification(decompose(change), base, rank=1).factor is None


def test_the_base_in_random_directions_is_what_is_said():
    base = torch.randn(12, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    change = decompose(draw_directions(4, 12).t() @ draw_directions(4, 9))
    squares = [
        torch.linalg.matrix_norm(draw_directions(4, 12, seed=s) @ base @ draw_directions(4, 9, seed=s + 999).t()) ** 2
        for s in range(400)
    ]
    mean = torch.stack(squares).mean().sqrt().item()
    # a mean over 400 draws, each with a deviation of about 40 %
    assert amplification(change, base, rank=4).base_in_random == pytest.approx(mean, rel=0.05)
