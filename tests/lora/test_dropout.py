import itertools

import pytest
import torch
from torch import nn

from lorasweep.lora.dropout import BITS, Dropout, DropoutMasks, _draw_words
from lorasweep.lora.inject import replace_dropout

SIZE = 2**16
MAX_SIGMAS = 6
"""Bound of each check of randomness, in standard deviations: by chance one of 500 million checks fails."""


def draw(seeds=(0,), place=(0, 0, 0), *, layer="", rates=None, size=SIZE, earlier=0):
    """Returns the mask of each slot, (slots, size), after `earlier` draws of the layer."""
    masks = DropoutMasks(seeds)
    masks.begin(*place)
    for _ in range(earlier):
        masks.draw(torch.ones(len(seeds)), [0.5] * len(seeds), layer=layer)
    return masks.draw(torch.ones(len(seeds), size), rates or [0.5] * len(seeds), layer=layer)


def assert_uncorrelated(samples):
    """Checks (samples, numbers): each correlation of two samples is 0 but for chance, 1 / √numbers."""
    correlation = torch.corrcoef(samples.double()) - torch.eye(len(samples))
    assert float(correlation.abs().max()) < MAX_SIGMAS / samples.shape[1] ** 0.5


@pytest.mark.parametrize("step", [0, 1, 2])
def test_each_slot_drops_with_its_rate_in_each_step(step):
    rates = [0.0, 1e-9, 0.1, 0.5, 0.999]
    keep = draw(range(5), (step,), rates=rates)
    assert (keep.dtype, keep.shape) == (torch.bool, (5, SIZE))
    for mask, rate in zip(keep, rates, strict=True):
        deviation = (rate * (1 - rate) / SIZE) ** 0.5
        assert abs(float((~mask).double().mean()) - rate) <= MAX_SIGMAS * deviation
        assert torch.equal(mask, draw([rates.index(rate)], (step,), rates=[rate])[0])


def test_each_bit_of_a_word_is_fair_and_independent_of_the_others():
    words = _draw_words(["a", "b"], SIZE, torch.device("cpu")).view(torch.int16)
    assert words.shape == (2, SIZE)
    bits = torch.stack([words.flatten() >> bit & 1 for bit in range(BITS)]).double()
    assert float((bits.mean(1) - 0.5).abs().max()) < MAX_SIGMAS * 0.5 / bits.shape[1] ** 0.5
    assert_uncorrelated(bits)


def test_masks_of_all_keys_and_of_neighbouring_elements_are_uncorrelated():
    places = [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (11, 0, 0)]
    keys = itertools.product(places, ["", "0.up", "0.down"], [0, 1])
    masks = torch.cat([draw((0, 1, 10, 2**62), place, layer=layer, earlier=n) for place, layer, n in keys])
    assert_uncorrelated(masks)
    for distance in (1, 2, 3, 4, 8, 64):
        assert_uncorrelated(torch.stack([masks[:, distance:].flatten(), masks[:, :-distance].flatten()]))


def test_the_mask_of_a_slot_follows_from_its_key_alone():
    alone = draw([7], (3, 1, 0), layer="up", size=77)  # no whole number of words
    assert torch.equal(alone, draw([7], (3, 1, 0), layer="up", size=77))
    for rates in ([0.5, 0.5, 0.5], [0.1, 0.5, 0.0]):
        assert torch.equal(alone[0], draw([8, 7, 7], (3, 1, 0), layer="up", rates=rates, size=77)[1])
    masks = DropoutMasks([8, 9, 7])
    masks.begin(3, 1, 0)
    for layer in ("", "down", "up.down"):  # other layers that drop before
        masks.draw(torch.ones(3), [0.5] * 3, layer=layer)
    with masks.compute_only_slot(2):
        assert torch.equal(alone, masks.draw(torch.ones(1, 77), [0.5] * 3, layer="up"))


def test_saved_masks_are_drawn_again():
    masks = DropoutMasks([7])
    masks.begin(5)
    x = torch.ones(1, 99)
    masks.drop(x, 0.5)
    saved, first = masks.save(), [masks.drop(x, 0.5) for _ in range(2)]
    third = masks.drop(x, 0.5)
    with saved:
        assert torch.equal(torch.stack([masks.drop(x, 0.5) for _ in range(2)]), torch.stack(first))
    assert not torch.equal(masks.drop(x, 0.5), third)  # the draws go on where they were


@pytest.mark.parametrize("rate", [0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_kept_elements_are_scaled_and_the_mean_stays(dtype, rate):
    x = torch.ones(2, SIZE, dtype=dtype, requires_grad=True)
    output = Dropout(rate, DropoutMasks([1, 2]))(x)
    output.sum().backward()
    assert output.dtype is dtype
    assert torch.equal(output, x.grad)
    kept = {torch.tensor(1 / (1 - rate), dtype=dtype).item()} if rate < 1 else set()
    assert set(output.unique().tolist()) == {0.0} | kept
    if rate < 1:
        # bf16 rounds 1 / (1 - rate), here to exactly 1.25
        assert float(output.detach().double().mean()) == pytest.approx(1, abs=MAX_SIGMAS * 0.5 / (2 * SIZE) ** 0.5)


def test_a_tensor_without_rows_of_slots_drops_as_of_the_first_slot():
    bias = torch.ones(33)
    dropped = DropoutMasks([1, 2]).drop(bias, 0.5)
    assert torch.equal(dropped, DropoutMasks([1]).drop(bias[None], 0.5)[0])


def test_modules_are_replaced_and_evaluation_draws_nothing():
    masks = DropoutMasks([0])
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.25), nn.Dropout1d(0.5)))
    replace_dropout(model, masks)
    assert [type(module) for module in (model[0], *model[1])] == [Dropout, Dropout, nn.Dropout1d]
    assert model[1][0].p == 0.25
    shared = nn.Dropout(0.5)
    twice = nn.Sequential(shared, nn.Linear(2, 2), shared)
    replace_dropout(twice, masks)
    assert type(twice[0]) is Dropout
    assert twice[2] is twice[0]
    x = torch.ones(4)
    assert torch.equal(model.eval()[0](x), x)
    assert not masks.count_draws()
