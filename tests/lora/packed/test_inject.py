import pytest
import torch
from torch import nn

from lorasweep.lora import LoraConfig, inject_packed_lora


def test_the_slots_train_and_the_base_does_not(make_model):
    model = make_model()
    base = list(model.parameters())
    slots = inject_packed_lora(model, [LoraConfig(rank=2), LoraConfig(targets=("proj",), modules_to_save=("out",))])
    assert not any(parameter.requires_grad for parameter in (*base, *model.parameters()))
    assert all(any(p.requires_grad for p in solo.parameters()) for solo in slots.models)


def tie(model):
    model.out.weight = model.embed.weight


def count(model):
    model.out.register_buffer("count", torch.zeros(()))


def normalise(model):
    model.norm = nn.BatchNorm1d(4)


UP, INSIDE = LoraConfig(targets=("0.up",)), LoraConfig(targets=("0.up",), modules_to_save=("1.up",))
WHOLE = LoraConfig(targets=("0.up",), modules_to_save=("layers.1",))
HEAD = LoraConfig(targets=("up",), modules_to_save=("out",))
REFUSED = [
    ([LoraConfig(), LoraConfig(targets=("upp",))], None, ["Did you mean `up`"]),
    ([LoraConfig(), LoraConfig(rank=99)], None, ["`method.rank <= 8` must hold"]),
    ([UP, LoraConfig(targets=("proj",), modules_to_save=("0.up",))], None, ["must be the same", "'layers.0.up'"]),
    ([LoraConfig(targets=("1.up",)), WHOLE], None, ["must be the same", "'layers.1.up'"]),
    ([WHOLE, INSIDE], None, ["must be the same", "'layers.1.up'"]),
    ([LoraConfig(targets=("up",), modules_to_save=("embed", "out"))], tie, ["share a weight", "'embed' does"]),
    ([HEAD], count, ["must not have buffers", "'out' does"]),
    ([LoraConfig(), LoraConfig()], normalise, ["'norm' is a batch norm", "without packs"]),
]


@pytest.mark.parametrize(("configs", "change", "words"), REFUSED)
def test_a_pack_that_can_not_be_made_is_refused_and_the_model_stays_as_it_was(make_model, configs, change, words):
    model = make_model()
    if change is not None:
        change(model)
    before = str(model)
    with pytest.raises(ValueError, match="must ") as raised:
        inject_packed_lora(model, configs)
    assert [word for word in words if word not in str(raised.value)] == []
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())
