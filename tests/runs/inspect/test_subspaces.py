"""φ at its ends, against its definition, and its means over layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.config.method import FullConfig
from lorasweep.runs.inspect.changes import weight_changes
from lorasweep.runs.inspect.spectrum import decompose
from lorasweep.runs.inspect.subspaces import GRID, MEAN, compare_subspaces, top_directions

from .conftest import lora


def draw_directions(count: int, dimension: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimension, count, generator=generator, dtype=torch.float64))[0].t()


def phi(first, second):
    return {(row.i, row.j): row.phi for row in compare_subspaces({"q": first}, {"q": second}) if row.layer == "q"}


def test_a_subspace_is_wholly_similar_to_itself():
    directions = draw_directions(12, 20)
    found = phi(directions, directions)
    assert sorted({i for i, _ in found}) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    # the smaller set lies within the larger one everywhere
    assert list(found.values()) == pytest.approx([1.0] * 100, abs=1e-12)


def test_orthogonal_subspaces_are_not_similar():
    rotation = draw_directions(10, 10)
    assert list(phi(rotation[:4], rotation[4:]).values()) == pytest.approx([0.0] * 24, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 50))
def test_phi_is_its_definition(n, m, seed):
    first, second = draw_directions(n, 9, seed=seed), draw_directions(m, 9, seed=seed + 1000)
    for (i, j), value in phi(first, -second).items():  # signs are free
        expected = torch.linalg.matrix_norm(first[:i] @ second[:j].t()) ** 2 / min(i, j)
        assert value == pytest.approx(expected.item(), abs=1e-12)


def test_random_directions_are_as_similar_as_is_said():
    draws = [
        compare_subspaces({"q": draw_directions(8, 40, seed=s)}, {"q": draw_directions(4, 40, seed=s + 500)})
        for s in range(200)
    ]
    for rows in zip(*draws, strict=True):
        mean = sum(row.phi for row in rows) / len(rows)
        # four standard errors of a mean over 200 draws; one draw of φ(1, 1) has deviation √2 / 40
        assert mean == pytest.approx(rows[0].random, abs=4 * math.sqrt(2 / 200) / 40)


def test_the_grid_ends_where_one_run_ends():
    found = phi(draw_directions(64, 70), draw_directions(9, 70, seed=1))
    assert tuple(sorted({i for i, _ in found})) == GRID
    assert sorted({j for _, j in found}) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_means_are_over_the_layers_that_have_so_many_directions():
    first = {"p": draw_directions(1, 10), "q": draw_directions(2, 20)}
    second = {"p": first["p"], "q": draw_directions(1, 20, seed=1), "elsewhere": first["p"]}
    rows = compare_subspaces(first, second)
    by_cell = {(row.layer, row.i, row.j): row for row in rows}
    assert by_cell.keys() == {(MEAN, 1, 1), (MEAN, 2, 1), ("p", 1, 1), ("q", 1, 1), ("q", 2, 1)}
    assert by_cell[MEAN, 1, 1].phi == pytest.approx((1 + by_cell["q", 1, 1].phi) / 2)
    assert by_cell[MEAN, 1, 1].random == pytest.approx(0.075)
    assert by_cell[MEAN, 2, 1].phi == pytest.approx(by_cell["q", 2, 1].phi)


def decompose_changes(changes):
    return {change.name: decompose(change.left, change.right) for change in changes if change.is_matrix}


def test_directions_in_which_nothing_changed_are_left_out(base, trained):
    model = trained(lora(rank=4))
    model.model.layers[0].self_attn.q_proj.lora_b.data[:, 2:] = 0
    model.model.layers[1].self_attn.q_proj.lora_b.data.zero_()
    found = top_directions(decompose_changes(weight_changes(model, base.model)))
    assert len(found["model.layers.0.self_attn.q_proj"]) == 2
    assert "model.layers.1.self_attn.q_proj" not in found
    assert len(found) == 13


def test_directions_are_those_of_the_dense_change(base, trained):
    changes = weight_changes(trained(FullConfig()), base.model)
    found = top_directions(decompose_changes(changes))
    change = next(change for change in changes if change.name == "model.layers.0.mlp.up_proj")
    vh = torch.linalg.svd(change.left, full_matrices=False)[2]
    torch.testing.assert_close((found[change.name] @ vh.t()).abs(), torch.eye(16).double(), rtol=0, atol=1e-9)
