"""PEFT loads what this package saves, for every kind of layer and variant, with the same logits."""

import peft
import pytest
import torch
import transformers
from torch import nn

from lorasweep.lora import LoraConfig, inject_lora, load_adapter, lora_layers, lora_state, save_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # what PEFT calls in transformers
    pytest.mark.filterwarnings("ignore:.*token_id must be:UserWarning"),
]
IDS = torch.arange(14).view(2, 7) % 11


def make_gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 24, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def make_llama():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=24, vocab_size=50, attention_bias=True)
    return transformers.LlamaForCausalLM(config).eval()


def make_bert():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=50)).eval()


def logits(model):
    output = model(IDS)
    return getattr(output, "logits", output)


def shake(model):
    """Moves everything that trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


EVERY_WAY = [
    (make_gpt2, {"targets": "all-linear"}),
    (make_llama, {"targets": "all-linear"}),
    (make_llama, {"targets": ("q_proj", "v_proj"), "scaling": "alpha_over_sqrt_rank"}),
    (make_llama, {"scaling": "alpha", "alpha": 1.5, "rank_pattern": {"down_proj": 6}}),
    (make_gpt2, {"targets": ("c_attn",), "scaling": "alpha", "alpha": 1.5}),
    (make_llama, {"rank_pattern": {"0.self_attn.q_proj": 2, "down_proj": 6}, "alpha_pattern": {"re:.*1.*v_proj": 3.0}}),
    (make_llama, {"layers": (1,), "exclude": ("o_proj",)}),
    (make_llama, {"modules_to_save": ("lm_head",)}),
    (make_llama, {"targets": ("q_proj", "lm_head")}),
    (make_bert, {"modules_to_save": ("classifier",)}),
]


@pytest.mark.parametrize(("make", "settings"), EVERY_WAY, ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_is_saved_here_gives_the_same_logits_everywhere(make, settings, tmp_path):
    config = LoraConfig(**{"rank": 4, "alpha": 6.0} | settings)
    model, base = make(), logits(make())
    inject_lora(model, config, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(model), base)  # float32 defaults: the start is the base up to rounding
    shake(model)
    expected = logits(model)
    assert (expected - base).abs().max() > 0.01
    save_adapter(model, tmp_path, base_path="")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), expected)
    fresh = make()
    inject_lora(fresh, config)
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), expected)
    assert all(torch.equal(t, lora_state(model)[key]) for key, t in lora_state(fresh).items())


def test_names_that_end_alike_stay_apart(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    model = make()
    inject_lora(model, LoraConfig(rank=1, targets=("re:0", "re:1.1"), rank_pattern={"re:0": 2}))
    shake(model)
    save_adapter(model, tmp_path, base_path="")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model(x))
    assert set(lora_layers(model)) == {"0", "1.1"}
