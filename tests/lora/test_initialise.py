import pytest
import torch
from torch import nn

from lorasweep.lora.layers import draw_matrices, split_principal_part


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("is_embedding", [True, False])
def test_the_change_starts_at_zero_and_can_learn(init, is_embedding):
    a, b = draw_matrices(d_out=6, d_in=10, rank=4, init=init, is_embedding=is_embedding)
    assert (a.shape, b.shape) == ((4, 10), (6, 4))
    torch.testing.assert_close(b @ a, torch.zeros(6, 10))  # orthogonal rows: zero up to rounding
    assert a.any() or b.any()


def draw(init, *, d_in=400):
    return draw_matrices(d_out=6, d_in=d_in, rank=8, init=init, generator=torch.Generator().manual_seed(0))


def test_how_each_way_starts():
    torch.manual_seed(0)
    assert torch.equal(draw("default")[0], nn.Linear(400, 8, bias=False).weight)
    assert draw("gaussian", d_in=10_000)[0].std().item() == pytest.approx(1 / 8, rel=0.02)  # 80,000 draws: 0.25 %
    assert all(matrix.any() for matrix in draw("orthogonal", d_in=10))
    assert torch.equal(draw("orthogonal")[0], draw("orthogonal")[0])


def test_pissa_takes_the_principal_part():
    matrix = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    a, b = split_principal_part(matrix, rank=2, scaling=3.0)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(3.0 * b @ a, u[:, :2] * s[:2] @ vh[:2])
    torch.testing.assert_close((b.norm(dim=0), a.norm(dim=1)), ((s[:2] / 3).sqrt(),) * 2)  # shared evenly
