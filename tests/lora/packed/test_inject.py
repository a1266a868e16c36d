import pytest
import torch
from torch import nn

from lorasweep.lora import LoraConfig, inject_lora, inject_packed_lora, lora_state, slot_model, split_lora_parameters
from lorasweep.lora.packed.inject import why_not_packable

from .conftest import stream

CONFIGS = [
    LoraConfig(rank=2, rank_pattern={"1.up": 5}),
    LoraConfig(rank=1, init="gaussian", targets=("proj", "embed")),
    LoraConfig(rank=4, init="orthogonal", targets=("proj",), modules_to_save=("out",)),
]


def test_every_slot_starts_as_its_solo_run(make_model):
    model = make_model()
    coverages = inject_packed_lora(model, CONFIGS, generators=[stream(k) for k in range(3)])
    for slot, config in enumerate(CONFIGS):
        solo = make_model()
        assert coverages[slot] == inject_lora(solo, config, generator=stream(slot))
        expected = lora_state(solo)
        got = lora_state(slot_model(model, slot))
        assert list(got) == list(expected)
        assert all(torch.equal(value, expected[key]) for key, value in got.items())


def test_starts_as_the_base_exactly(make_model, tokens):
    model, base = make_model(), make_model()
    inject_packed_lora(model, [LoraConfig(rank=2), LoraConfig(rank=1), LoraConfig(rank=3, targets=("up",))])
    assert torch.equal(model(tokens), base(tokens))


def test_the_parameters_of_the_slots_train_and_the_base_stays(make_model, tokens):
    model = make_model()
    base = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in base.items()}
    inject_packed_lora(model, CONFIGS)
    trains = [p for slot in range(3) for of in split_lora_parameters(slot_model(model, slot)) for p in of]
    assert {id(p) for p in trains} == {id(p) for p in model.parameters() if p.requires_grad}
    model(tokens).sum().backward()
    for name, parameter in base.items():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(variant="dora"), "`method.variant=dora` can't be packed"),
        (LoraConfig(init="pissa"), "`method.init=pissa` can't be packed"),
    ],
)
def test_says_why_a_configuration_can_not_be_packed(make_model, config, words):
    assert words in why_not_packable(config)
    assert why_not_packable(LoraConfig()) is None
    with pytest.raises(ValueError, match=f"slot 1 must be packable, but {words}"):
        inject_packed_lora(make_model(), [LoraConfig(), config])


def test_a_refused_request_leaves_the_model_as_it_was(make_model):
    model = make_model()
    before = str(model)
    up, proj = LoraConfig(targets=("0.up",)), LoraConfig(targets=("proj",), modules_to_save=("0.up",))
    whole, inside = (LoraConfig(targets=("0.up",), modules_to_save=(name,)) for name in ("layers.1", "1.up"))
    for configs, words in (
        ([LoraConfig(), LoraConfig(targets=("upp",))], "Did you mean `up`"),
        ([LoraConfig(), LoraConfig(rank=99)], "`method.rank <= 8` must hold"),
        ([up, proj], "must be the same"),
        ([LoraConfig(targets=("1.up",)), whole], "must be the same"),
        ([whole, inside], "must be the same"),
    ):
        with pytest.raises(ValueError, match=words):
            inject_packed_lora(model, configs)
    assert str(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_modules_that_share_a_weight_hold_buffers_or_mix_rows_are_refused(make_model):
    tied = make_model()
    tied.out.weight = tied.embed.weight
    with pytest.raises(ValueError, match="'embed' does"):
        inject_packed_lora(tied, [LoraConfig(targets=("up",), modules_to_save=("embed", "out"))])
    counting = make_model()
    counting.counter = nn.Linear(3, 3)
    counting.counter.register_buffer("count", torch.zeros(()))
    with pytest.raises(ValueError, match="'counter' does"):
        inject_packed_lora(counting, [LoraConfig(targets=("up",), modules_to_save=("counter",))])
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'1' is a batch norm"):
        inject_packed_lora(model, [LoraConfig(rank=1)] * 2)
    assert type(model[0]) is nn.Linear
