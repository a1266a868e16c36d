"""The stacks that all layers of a step share."""

import torch
from torch import nn

from lorasweep.lora import LoraConfig, inject_packed_lora
from lorasweep.lora.packed.inject import find_slots

RANKS = (1, 20, 3)


def make_pack():
    """Returns a packed bf16 model that calls a layer twice. B is random, so that A has gradients."""
    torch.manual_seed(0)
    shared = nn.Linear(24, 24)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(24, 40)).bfloat16()
    # scalings are powers of two, so that the sum of scaled bf16 gradients is exact in fp32
    inject_packed_lora(model, [LoraConfig(rank=rank, alpha=2 * rank) for rank in RANKS])
    for parameter in trained(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def compute_gradients(model, *batches):
    """Returns the gradients of the sum over micro-batches in one step."""
    for parameter in trained(model):
        parameter.grad = None
    with find_slots(model).stacks.share():
        for batch in batches:
            model(batch).float().square().sum().backward()
    return [parameter.grad for parameter in trained(model)]


def draw(rows=2):
    return torch.randn(len(RANKS) * rows, 24).bfloat16()


def test_gradients_of_micro_batches_are_added_up_in_fp32():
    model, first, second = make_pack(), draw(), draw(rows=3)
    apart = zip(compute_gradients(model, first), compute_gradients(model, second), strict=True)
    expected = [one + other for one, other in apart]
    found = compute_gradients(model, first, second)
    assert {grad.dtype for grad in found} == {torch.float32}
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    in_bf16 = [(a.bfloat16() + b.bfloat16()).float() for a, b in zip(found, expected, strict=True)]
    assert not all(torch.equal(one, other) for one, other in zip(found, in_bf16, strict=True))
