import pytest
import torch
from torch import nn

from lorasweep.lora.initialise import draw_matrices, split_principal_part


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("is_embedding", [True, False])
def test_the_change_starts_at_zero_and_can_learn(init, is_embedding):
    a, b = draw_matrices(d_out=6, d_in=10, rank=4, init=init, is_embedding=is_embedding)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((4, 10), (6, 4), torch.float32, torch.float32)
    torch.testing.assert_close(b @ a, torch.zeros(6, 10))  # orthogonal rows: zero up to rounding
    assert a.any() or b.any()


def test_default_is_how_a_linear_layer_starts():
    a, _ = draw_matrices(d_out=6, d_in=400, rank=8, init="default", generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert torch.equal(a, nn.Linear(400, 8, bias=False).weight)


def test_gaussian_has_deviation_one_over_rank():
    a, _ = draw_matrices(d_out=6, d_in=10_000, rank=8, init="gaussian", generator=torch.Generator().manual_seed(0))
    assert a.std().item() == pytest.approx(1 / 8, rel=0.02)  # 80,000 draws: deviation 0.25 %


def test_orthogonal_draws_both_at_random():
    a, b = draw_matrices(d_out=6, d_in=10, rank=4, init="orthogonal")
    assert a.any()
    assert b.any()


def test_pissa_takes_the_principal_part():
    matrix = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    a, b = split_principal_part(matrix, rank=2, scaling=3.0)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(3.0 * b @ a, u[:, :2] * s[:2] @ vh[:2])
    torch.testing.assert_close((b.norm(dim=0), a.norm(dim=1)), ((s[:2] / 3).sqrt(),) * 2)  # shared evenly


def test_the_generator_decides():
    draws = [
        draw_matrices(d_out=6, d_in=10, rank=4, init="orthogonal", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draws[2][0])
