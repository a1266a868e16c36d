"""Adapters of PEFT: they leave the shared base alone, come back as they were, and PEFT loads the files."""

import contextlib
import copy

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import BertConfig, BertForSequenceClassification

from lorasweep.config.method import PeftConfig
from lorasweep.errors import ConfigError
from lorasweep.methods import bind, copy_sharing_weights

from .conftest import TOKENS, as_base, make_base, prepare, train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # what PEFT calls
METHOD = bind(PeftConfig())
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
LORA = {"peft_type": "LORA", "r": 2, **TARGETS}
KINDS = {
    "vera": {"peft_type": "VERA", "r": 4, **TARGETS},
    "ia3": {"peft_type": "IA3", **TARGETS, "feedforward_modules": ["down_proj"]},
    "vblora": {"peft_type": "VBLORA", "vector_length": 4, "num_vectors": 8, **TARGETS},  # shares one parameter
    "norms": {"peft_type": "LN_TUNING"},
    "tied": {**LORA, "target_modules": ["lm_head"]},
    "dora": {**LORA, "use_dora": True},
    "whole head": {**LORA, "modules_to_save": ["lm_head"]},
    "biases": {**LORA, "bias": "all"},  # trains weights of the base, on copies
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # PEFT, when it loads them
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_alone_and_comes_back_here_and_in_peft(kind, tmp_path):
    base = make_base(dtype=torch.float32)
    before = copy.deepcopy(base.model.state_dict())
    config = PeftConfig(config=KINDS[kind])
    bind(config).check(base.model)
    model = prepare(base, "peft", config=config)
    losses = train(model, "peft")
    assert losses[-1] < losses[0]
    assert train(prepare(base, "peft", config=config), "peft") == losses
    METHOD.save(model, tmp_path, base=base)
    loaded = copy_sharing_weights(base.model)
    METHOD.load(loaded, tmp_path)
    expected = model.eval()(input_ids=TOKENS).logits
    assert torch.equal(loaded.eval()(input_ids=TOKENS).logits, expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).eval()
    assert torch.equal(theirs(input_ids=TOKENS).logits, expected)
    METHOD.merge(loaded)
    # fp32: sums in another order, through two blocks
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("default" in name for name in loaded.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_new_head_trains_and_is_saved(tmp_path):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=32))
    base = as_base(model, new_head_names=("classifier",))
    config = PeftConfig(config={"peft_type": "IA3", "target_modules": ["key"], "feedforward_modules": []})
    prepared, loaded = bind(config).prepare(base, generator=torch.Generator()), copy_sharing_weights(model)
    trained = [name for name, p in prepared.named_parameters() if p.requires_grad]
    assert [name for name in trained if name.startswith("classifier.")]
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            if name in trained:
                parameter += 0.1
    METHOD.save(prepared, tmp_path, base=base)
    METHOD.load(loaded, tmp_path)
    assert torch.equal(loaded.eval()(input_ids=TOKENS).logits, prepared.eval()(input_ids=TOKENS).logits)
    config = PeftConfig(config={"peft_type": "TRAINABLE_TOKENS", "token_indices": [1]})
    with pytest.raises(ConfigError, match=r"TRAINABLE_TOKENS.*modules_to_save"):
        bind(config).check(model, new_head_names=("classifier",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "must make None with `method.config`"),
        ({"peft_type": "VERA", "target_module": ["q_proj"]}, "VERA.*`method.config`.*'target_module'"),
        ({"peft_type": "VERA", "target_modules": ["q_prj"]}, "VERA .*`method.config`.*target_modules"),
        ({**LORA, "megatron_config": {"a": 1}, "megatron_core": "os"}, "LORA .*'os'"),
        ({**LORA, "init_lora_weights": "what"}, "'what'"),
        ({**LORA, "init_lora_weights": "olora"}, "as it is, but got .olora"),
        ({**LORA, "init_lora_weights": "eva"}, "no calls or data, .* 'eva'"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, "must replace layers .* PREFIX_TUNING"),
        ({"peft_type": "ADALORA", "total_step": 9, **TARGETS}, "no calls or data, .* 'ADALORA'"),
    ],
)
def test_what_a_run_cannot_do_is_refused_by_name(settings, message):
    base = make_base()
    before = copy.deepcopy(base.model.state_dict())
    with pytest.raises(ConfigError, match=message):
        bind(PeftConfig(config=settings)).check(base.model)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())


def test_a_kind_that_does_not_merge_is_refused():
    base = make_base(dtype=torch.float32)
    lily = prepare(base, "peft", config=PeftConfig(config={"peft_type": "LILY", "r": 2, **TARGETS}))
    with pytest.raises(ConfigError, match=r"one that PEFT can merge .* `lorasweep export --format peft`"):
        METHOD.merge(lily)


@pytest.mark.parametrize("kind", sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_every_kind_of_peft_is_made_or_refused_without_a_change_of_the_base(kind):
    base = make_base()
    before = copy.deepcopy(base.model.state_dict())
    known = PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    settings = {key: value for key, value in {**TARGETS, "r": 2, "block_size": 4}.items() if key in known}
    with contextlib.suppress(ConfigError):
        prepare(base, "peft", config=PeftConfig(config={"peft_type": kind, **settings}))
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"use_dora": True, "rank_pattern": {"down_proj": 3}},
    ],
)
def test_pissa_starts_as_the_shared_base_and_leaves_it_alone(settings):
    base = make_base(dtype=torch.float32)
    before = copy.deepcopy(base.model.state_dict())
    config = PeftConfig(config={**LORA, "init_lora_weights": "pissa", **settings})
    model = prepare(base, "peft", config=config)
    # fp32: the principal part is subtracted from the weights and added to the outputs
    torch.testing.assert_close(
        model(input_ids=TOKENS).logits, base.model(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-4
    )
    assert next(model.get_submodule("model.layers.0.self_attn.q_proj").lora_B.parameters()).any()
    losses = train(model, "peft")
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
