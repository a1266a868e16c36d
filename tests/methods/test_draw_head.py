"""A run draws its new head from its own seed, alone or in a pack, and never in the base."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from lorasweep.config.method import FrozenConfig, FullConfig, LoraConfig
from lorasweep.errors import ConfigError
from lorasweep.lora.fully_trained import trained_modules
from lorasweep.methods import bind, draw_head

from .conftest import as_base

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_labels": 3,
    "attention_probs_dropout_prob": 0.0,  # drawn inside a function, in a pack from torch's own stream for all rows
}
HEADS = {"bert": ("bert.pooler", "classifier"), "roberta": ("classifier",)}
CONFIGS = {
    "lora": LoraConfig(rank=2),
    "full": FullConfig(),
    "head": FullConfig(parameters="classifier.*"),
    "frozen": FrozenConfig(),
}
TOKENS = torch.arange(1, 33).reshape(4, 8)


@pytest.fixture(params=["bert", "roberta"])
def base(request):
    torch.manual_seed(0)
    kind, settings = {
        "bert": (BertForSequenceClassification, BertConfig),
        "roberta": (RobertaForSequenceClassification, RobertaConfig),
    }[request.param]
    return as_base(kind(settings(**SIZES)), kind="classifier", new_head_names=HEADS[request.param])


def prepare(base, name, seed):
    return bind(CONFIGS[name]).prepare(base, generator=torch.Generator().manual_seed(seed))


def test_values_are_those_of_a_fresh_head():
    model = nn.Module()
    model.head = nn.Sequential(nn.Linear(400, 500), nn.LayerNorm(500))
    model.config = BertConfig(initializer_range=0.1)
    draw_head(model, ["head"], generator=torch.Generator().manual_seed(0))
    weight = model.head[0].weight
    assert weight.std().item() == pytest.approx(0.1, rel=0.02)  # 200,000 draws: deviation of the deviation 0.2 %
    assert abs(weight.mean().item()) < 0.001  # four deviations of the mean
    assert not model.head[0].bias.any()
    assert torch.equal(model.head[1].weight, torch.ones(500))
    assert not model.head[1].bias.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_head_depends_on_the_seed_alone_and_the_base_keeps_its_own(base, name):
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    first, again, other, frozen = (
        prepare(base, method, seed).eval()(input_ids=TOKENS).logits
        for method, seed in ((name, 5), (name, 5), (name, 6), ("frozen", 5))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first, frozen)  # every method has the same head
    assert all(torch.equal(base.model.state_dict()[key], tensor) for key, tensor in before.items())


def test_head_of_any_name_is_trained_in_full_and_not_adapted():
    model = nn.Sequential()
    model.add_module("body", nn.Linear(8, 8))
    model.add_module("top", nn.Linear(8, 2))
    config = LoraConfig(rank=4)
    with pytest.raises(ConfigError, match=r"`method.rank <= 2` must hold for layer 'top'"):
        bind(config).check(model)
    bind(config).check(model, new_head_names=("top",))
    bind(CONFIGS["head"]).check(model, new_head_names=("top",))


def test_head_is_rounded_to_the_base_and_trains_in_fp32(base):
    for parameter in base.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    frozen, lora = prepare(base, "frozen", 3), prepare(base, "lora", 3)
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.bfloat16}
    modules = trained_modules(lora)
    assert tuple(modules) == base.new_head_names
    for module in modules.values():
        assert all(p.dtype == torch.float32 and p.requires_grad for p in module.trained.parameters())
