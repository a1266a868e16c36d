"""Rows and directions of changes whose numbers are known."""

from __future__ import annotations

import pytest
import torch

from lorasweep.config.method import FullConfig
from lorasweep.runs.inspect.changes import Change, Place, weight_changes
from lorasweep.runs.inspect.measure import (
    compare_directions,
    decompose_changes,
    leading_directions,
    mean_similarity,
    measure_layers,
)
from lorasweep.runs.inspect.subspaces import Similarity

from .conftest import lora


def make_change(name, left, base, **values):
    values = {"right": None, "place": Place(), **values}
    return Change(name=name, base=base, left=left, **values)


def test_a_row_has_the_norms_ranks_and_share_of_its_change():
    diagonal = torch.diag(torch.tensor([3.0, 4.0, 0.0]))
    changes = [
        make_change("blocks.1.proj", diagonal, 2 * torch.eye(3)),
        make_change("blocks.1.proj.bias", torch.tensor([0.0, 5.0]), torch.tensor([3.0, 4.0])),
    ]
    matrix, vector = measure_layers(changes, decompose_changes(changes))
    assert (matrix.layer, matrix.block, matrix.kind, matrix.d_out, matrix.d_in) == ("blocks.1.proj", 1, "proj", 3, 3)
    assert matrix.change_norm == pytest.approx(5)
    assert matrix.base_norm == pytest.approx(2 * 3**0.5)
    assert matrix.relative_norm == pytest.approx(5 / (2 * 3**0.5))
    assert (matrix.change_spectral_norm, matrix.base_spectral_norm) == (pytest.approx(4), pytest.approx(2))
    assert matrix.stable_rank == pytest.approx(25 / 16)
    assert matrix.energy_rank == 2  # the first holds 64 %
    assert matrix.amplification_rank == 2
    assert matrix.amplification == pytest.approx(5 / 8**0.5)
    assert matrix.norm_share == vector.norm_share == pytest.approx(0.5)
    assert (vector.change_norm, vector.base_norm, vector.d_in) == (5, 5, None)
    assert (vector.effective_rank, vector.amplification, vector.trained_rank) == (None, None, None)


def test_a_change_of_a_zero_base_has_no_relative_norm():
    changes = [make_change("head", torch.eye(2), torch.zeros(2, 2))]
    (row,) = measure_layers(changes, decompose_changes(changes))
    assert (row.relative_norm, row.amplification) == (None, None)


def test_lora_is_amplified_over_its_trained_rank_as_in_the_paper(base, trained):
    changes = weight_changes(trained(lora(rank=3)), base.model)
    for change, row in zip(changes, measure_layers(changes, decompose_changes(changes)), strict=True):
        dense = (change.left @ change.right.double()).detach()
        u, _, vh = torch.linalg.svd(dense)
        inside = u[:, :3].t() @ change.base.double() @ vh[:3].t()
        assert row.amplification_rank == 3
        assert row.amplification == pytest.approx((dense.norm() / inside.norm()).item(), rel=1e-6)


def test_directions_of_zero_are_left_out(base, trained):
    model = trained(lora(rank=4))
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_b.data[:, 2:] = 0
    model.model.layers[1].self_attn.q_proj.lora_b.data.zero_()
    changes = weight_changes(model, base.model)
    found = leading_directions(changes, decompose_changes(changes))
    assert {side: len(rows) for side, rows in found["model.layers.0.self_attn.q_proj"].items()} == {
        "a": 4,
        "input": 2,
        "output": 2,
    }
    assert "model.layers.1.self_attn.q_proj" not in found
    assert len(found) == 13


def test_directions_are_those_of_the_dense_change(base, trained):
    changes = weight_changes(trained(FullConfig()), base.model)
    found = leading_directions(changes, decompose_changes(changes))
    change = next(change for change in changes if change.name == "model.layers.0.mlp.up_proj")
    u, _, vh = torch.linalg.svd(change.left, full_matrices=False)
    for side, expected in (("input", vh), ("output", u.t())):
        overlap = (found[change.name][side] @ expected.t()).abs()  # signs are free
        torch.testing.assert_close(overlap, torch.eye(16).double(), rtol=0, atol=1e-9)


def test_runs_are_compared_where_both_changed_and_by_sides_that_both_have(base, trained):
    first = weight_changes(trained(lora(targets=("q_proj", "v_proj"))), base.model)
    second = weight_changes(trained(FullConfig()), base.model)
    directions = [leading_directions(changes, decompose_changes(changes)) for changes in (first, second)]
    values = compare_directions(*directions)
    assert {layer.rpartition(".")[2] for layer, _ in values} == {"q_proj", "v_proj"}
    assert {side for _, side in values} == {"input", "output"}


def test_means_are_over_the_layers_that_have_so_many_directions():
    small = Similarity(rows=(1,), columns=(1,), values=torch.tensor([[0.2]]), dimension=10)
    large = Similarity(rows=(1, 2), columns=(1,), values=torch.tensor([[0.4], [0.8]]), dimension=20)
    values = {("p", "input"): small, ("q", "input"): large, ("q", "output"): small}
    means = mean_similarity(values, "input")
    assert means.keys() == {(1, 1), (2, 1)}
    assert means[1, 1] == pytest.approx((0.3, 0.075))
    assert means[2, 1] == pytest.approx((0.8, 0.1))
