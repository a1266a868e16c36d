from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasweep.lora import LoraConfig, inject_packed_lora
from lorasweep.lora.dropout import FunctionalDropout

from .conftest import randomise, stream


class Dropping(nn.Module):
    """Drops in a module and in a function."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(6, 8), nn.Linear(8, 6), nn.Dropout(0.3)

    def forward(self, x):
        hidden = self.drop(self.up(x))
        return self.drop(self.down(nn.functional.dropout(hidden, 0.2, self.training)))


def make_dropping():
    torch.manual_seed(0)
    return Dropping()


CONFIGS = [LoraConfig(rank=2, dropout=0.4), LoraConfig(rank=1), LoraConfig(rank=1, targets=("down",), dropout=0.2)]
X = torch.randn(6, 5, 6, generator=stream(1))


def make_pack():
    model = make_dropping()
    slots = inject_packed_lora(model, CONFIGS, generators=[stream(8)] * 3, dropout_seeds=[70, 71, 72])
    for solo in slots.models:
        randomise(solo, 9)
    return model, slots


def test_the_masks_of_a_slot_are_those_of_its_pack_of_one(make_packs):
    make_packs(make_dropping, CONFIGS).assert_equal(X.double())


def save_contexts(masks):
    @contextmanager
    def compute_again(saved):
        with saved, FunctionalDropout(masks.drop):
            yield

    return nullcontext(), compute_again(masks.save())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_activation_checkpointing_draws_the_same_masks_again(micro_batches):
    outcomes = []
    for again in (False, True):
        model, slots = make_pack()
        masks = slots.masks
        masks.begin(3)
        run = partial(checkpoint, model, use_reentrant=False, context_fn=partial(save_contexts, masks))
        x, outputs = X.clone().requires_grad_(), []
        with FunctionalDropout(masks.drop):
            for _ in range(micro_batches):
                first, second = (compute(x) for compute in [run if again else model] * 2)
                (first + 2 * second).sum().backward()
                outputs += [first, second]
        outcomes.append([*outputs, x.grad, *(p.grad for p in slots.weights.parameters() if p.numel())])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    assert not torch.equal(first, second)
