from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasweep.lora import LoraConfig, inject_packed_lora, set_dropout_streams
from lorasweep.lora.dropout import Dropout
from lorasweep.lora.packed.inject import find_slots

from .conftest import stream


def make_dropping(p=0.3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(p), nn.Linear(8, 6), nn.Dropout(p))


CONFIGS = [LoraConfig(rank=2, dropout=0.4), LoraConfig(rank=1), LoraConfig(rank=1, targets=("2",), dropout=0.2)]


def test_masks_are_those_of_solo_runs_and_evaluation_drops_nothing(make_pack):
    x = torch.randn(6, 5, 6, generator=stream(1), dtype=torch.float64)
    both = make_pack(make_dropping, CONFIGS)
    both.assert_equal(x)
    both.pack.eval()
    both.solos = [solo.eval() for solo in both.solos]
    torch.testing.assert_close(*both.run(x))
    assert torch.equal(both.pack(x), both.run(x)[0])  # whatever the streams


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_of_a_slot_is_that_of_a_solo_run(dtype, shape):
    model = make_dropping()
    inject_packed_lora(model, CONFIGS[:2])
    set_dropout_streams(model, [stream(8), stream(9)])
    x = torch.randn(shape, generator=stream(1)).to(dtype)
    outputs = model[1](x).chunk(2)
    for slot, rows in enumerate(x.chunk(2)):
        with torch.random.fork_rng():
            torch.manual_seed(8 + slot)
            assert torch.equal(outputs[slot], Dropout(0.3)(rows))


def test_evaluation_and_probability_zero_draw_nothing():
    model = make_dropping(0.0)
    inject_packed_lora(model, CONFIGS[1:2])
    streams = [stream(8)]
    set_dropout_streams(model, streams)
    state = streams[0].get_state()
    x = torch.ones(2, 6)
    model(x)
    model[1].p = 0.5  # as code does that changes a model's dropout
    model.eval()
    assert torch.equal(model[1](x), x)
    assert torch.equal(streams[0].get_state(), state)
    model.train()
    assert not torch.equal(model[1](x), x)


@pytest.mark.parametrize("model_drops", [True, False])
def test_activation_checkpointing_draws_the_same_masks_again_or_is_refused(model_drops):
    model = make_dropping(0.3 if model_drops else 0.0)
    inject_packed_lora(model, [LoraConfig(rank=1, dropout=0.0 if model_drops else 0.3)] * 2)
    for parameter in model[0].lora_b:
        nn.init.ones_(parameter)  # with zeros, dropout would change nothing
    run = partial(checkpoint, model, use_reentrant=False)
    with pytest.raises(ValueError, match="must draw the dropout masks of a pack again"):
        run(torch.ones(2, 6, requires_grad=True)).sum().backward()
    outcomes = []
    for again in (False, True):
        x = torch.ones(2, 6, requires_grad=True)
        set_dropout_streams(model, [stream(8), None])  # the second slot draws from torch's default stream
        torch.manual_seed(9)
        compute = partial(run, context_fn=lambda: (nullcontext(), find_slots(model).save_streams())) if again else model
        first, second = compute(x), compute(x)
        (first + 2 * second).sum().backward()
        outcomes.append((first, second, x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    assert not torch.equal(first, second)
