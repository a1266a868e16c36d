"""Norms and ranks of changes whose numbers are known."""

from __future__ import annotations

import pytest
import torch

from lorasweep.runs.inspect.changes import Change, weight_changes
from lorasweep.runs.inspect.layers import measure_layers, relative_norm
from lorasweep.runs.inspect.spectrum import decompose

from .conftest import lora


def make_change(name, left, base):
    return Change(name=name, base=base, left=left)


def measure(changes):
    return measure_layers(changes, {c.name: decompose(c.left, c.right) for c in changes if c.is_matrix})


def test_a_row_has_the_norms_ranks_and_share_of_its_change():
    diagonal = torch.diag(torch.tensor([3.0, 4.0, 0.0]))
    changes = [
        make_change("blocks.1.proj", diagonal, 2 * torch.eye(3)),
        make_change("blocks.1.proj.bias", torch.tensor([0.0, 5.0]), torch.tensor([3.0, 4.0])),
    ]
    matrix, vector = measure(changes)
    assert (matrix.layer, matrix.block, matrix.kind, matrix.d_out, matrix.d_in) == ("blocks.1.proj", 1, "proj", 3, 3)
    assert matrix.change_norm == pytest.approx(5)
    assert matrix.base_norm == pytest.approx(2 * 3**0.5)
    assert relative_norm([matrix, vector]) == pytest.approx((50 / 37) ** 0.5)
    assert matrix.stable_rank == pytest.approx(25 / 16)
    assert matrix.energy_rank == 2  # the first holds 64 %
    assert matrix.amplification == pytest.approx(5 / 8**0.5)
    assert matrix.norm_share == vector.norm_share == pytest.approx(0.5)
    assert (vector.change_norm, vector.base_norm, vector.d_in) == (5, 5, None)
    assert (vector.effective_rank, vector.amplification, vector.trained_rank) == (None, None, None)


def test_a_change_of_a_zero_base_has_no_relative_norm():
    changes = [make_change("head", torch.eye(2), torch.zeros(2, 2))]
    (row,) = measure(changes)
    assert (relative_norm([row]), row.amplification) == (None, None)


def test_lora_is_amplified_over_its_trained_rank_as_in_the_paper(base, trained):
    changes = weight_changes(trained(lora(rank=3)), base.model)
    for change, row in zip(changes, measure(changes), strict=True):
        dense = (change.left @ change.right.double()).detach()
        u, _, vh = torch.linalg.svd(dense)
        inside = u[:, :3].t() @ change.base.double() @ vh[:3].t()
        assert row.amplification == pytest.approx((dense.norm() / inside.norm()).item(), rel=1e-6)
