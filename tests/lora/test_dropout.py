import pytest
import torch
from torch import nn

from lorasweep.lora.dropout import Dropout, draw_keep_mask
from lorasweep.lora.inject import replace_dropout


def stream(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
def test_each_element_is_dropped_with_the_rate(rate):
    size = 400_000
    keep = draw_keep_mask((4, size // 4), rate=rate, device=torch.device("cpu"), generator=stream(0))
    assert (keep.dtype, keep.shape) == (torch.bool, (4, size // 4))
    deviation = (rate * (1 - rate) / size) ** 0.5
    assert abs((~keep).double().mean() - rate) <= 4 * deviation
    if rate in (0, 1e-9, 1):
        return
    # the four elements of a random word are independent
    groups = (~keep).double().view(-1, 4)
    correlation = torch.corrcoef(groups.t()) - torch.eye(4)
    assert correlation.abs().max() < 4 / len(groups) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_kept_elements_are_scaled_and_the_mean_stays(dtype):
    x = torch.ones(100_000, dtype=dtype)
    output = Dropout(0.2)(x)
    assert output.dtype is dtype
    assert set(output.unique().tolist()) == {0.0, torch.tensor(1.25, dtype=dtype).item()}
    assert output.double().mean() == pytest.approx(1, abs=0.01)


def test_modules_are_replaced_and_evaluation_drops_nothing():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.25), nn.Dropout1d(0.5)))
    replace_dropout(model)
    assert [type(module) for module in (model[0], *model[1])] == [Dropout, Dropout, nn.Dropout1d]
    assert model[1][0].p == 0.25
    shared = nn.Dropout(0.5)
    twice = nn.Sequential(shared, nn.Linear(2, 2), shared)
    replace_dropout(twice)
    assert type(twice[0]) is Dropout
    assert twice[2] is twice[0]
    x = torch.ones(4)
    assert torch.equal(model.eval()[0](x), x)
    state = torch.get_rng_state()
    model.eval()[0](x)
    assert torch.equal(torch.get_rng_state(), state)
