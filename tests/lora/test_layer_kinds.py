from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasweep.lora.layer_kinds import can_be_adapted, is_linear, matrix_shape, matrix_to_weight, weight_to_matrix


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 5), (5, 3)),
        (Conv1D(5, 3), (5, 3)),
        (nn.Embedding(3, 5), (5, 3)),
        (nn.Conv2d(3, 5, (2, 4)), (5, 24)),
    ],
)
def test_every_weight_is_a_matrix_and_back(layer: nn.Module, shape: tuple[int, int]) -> None:
    assert can_be_adapted(layer)
    matrix = weight_to_matrix(layer, layer.weight)
    assert matrix_shape(layer) == tuple(matrix.shape) == shape
    assert torch.equal(matrix_to_weight(layer, matrix), layer.weight)
    assert matrix.data_ptr() == layer.weight.data_ptr()


def test_the_matrix_is_what_the_layer_multiplies_by() -> None:
    x = torch.randn(2, 3)
    for layer in (nn.Linear(3, 5, bias=False), Conv1D(5, 3)):
        torch.testing.assert_close(layer(x), x @ weight_to_matrix(layer, layer.weight).t())
    embedding = nn.Embedding(3, 5)
    assert torch.equal(embedding(torch.tensor(2)), weight_to_matrix(embedding, embedding.weight)[:, 2])


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Embedding(3, 5, max_norm=1.0),
        nn.MultiheadAttention(4, 2).out_proj,  # its weight is used without calling it
        nn.LayerNorm(3),
        nn.Conv1d(3, 3, 1),
    ],
)
def test_what_cannot_be_adapted(module: nn.Module) -> None:
    assert not can_be_adapted(module)


def test_linear_means_linear() -> None:
    assert is_linear(nn.Linear(2, 2))
    assert is_linear(Conv1D(2, 2))
    assert not is_linear(nn.Embedding(2, 2))
