"""`model.attention=auto` follows a rule, and sdpa in fp32 computes the model's attention."""

import copy

import pytest
import torch
import transformers

from lorasweep.models.attention import IMPLEMENTATIONS, choose_attention

SIZES = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make_model(*, head_size=32, dropout=0.0, attention="sdpa"):
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=2 * head_size, attention_dropout=dropout, num_key_value_heads=1
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)


@pytest.mark.parametrize(
    ("device", "dtype", "dropout", "max_tokens", "has_cpu_bf16", "name"),
    [
        ("cuda", "bf16", 0.1, 64, True, "sdpa"),
        ("cpu", "fp32", 0.1, 4096, True, "eager"),
        ("cpu", "bf16", 0.1, 4096, False, "eager"),
        ("cpu", "fp32", 0.0, 64, True, "sdpa"),
        ("cpu", "bf16", 0.0, 64, True, "eager"),
        ("cpu", "bf16", 0.0, 64, False, "sdpa_fp32"),
        ("cpu", "bf16", 0.0, 4096, True, "sdpa_fp32"),
    ],
)
@pytest.mark.parametrize("before", IMPLEMENTATIONS)
def test_the_rule_depends_on_device_dtype_dropout_and_length(
    device, dtype, dropout, max_tokens, has_cpu_bf16, name, before
):
    model = make_model(dropout=dropout, attention=before)
    arguments = {"device": torch.device(device), "dtype": DTYPES[dtype]}
    arguments |= {"max_tokens": max_tokens, "has_cpu_bf16": has_cpu_bf16}
    choice = choose_attention(model, **arguments)
    assert choice.name == model.config._attn_implementation == name
    assert choose_attention(model, **arguments) == choice


def test_dropout_in_the_settings_of_the_text_part_counts():
    text = {**SIZES, "hidden_size": 64, "head_dim": 32, "num_key_value_heads": 1, "attention_dropout": 0.1}
    config = transformers.Gemma3Config(text_config=text, vision_config={"num_hidden_layers": 1, "image_size": 28})
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration._from_config(config)
    arguments = {"device": torch.device("cpu"), "max_tokens": 64, "has_cpu_bf16": True}
    assert choose_attention(model, dtype=torch.float32, **arguments).name == "eager"


def test_model_with_one_implementation_keeps_it(monkeypatch):
    model = make_model(attention="eager")

    def refuse(name):
        if name != "eager":
            raise ValueError("does not support sdpa")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    choice = choose_attention(model, device=torch.device("cpu"), dtype=torch.float32, max_tokens=8, has_cpu_bf16=False)
    assert choice == ("eager", "the model has no other implementation")


@pytest.mark.parametrize("autocast", [False, True])
def test_sdpa_in_fp32_computes_more_exactly_than_sdpa_in_bf16_and_keeps_the_dtype(autocast):
    exact = make_model()
    ids = torch.randint(50, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < torch.tensor([40, 7, 31])[:, None]).long()
    expected = exact(input_ids=ids, attention_mask=mask).logits[mask.bool()]

    def error(attention):
        model = copy.deepcopy(exact)
        model.set_attn_implementation(attention)
        model = model if autocast else model.bfloat16()
        seen = []
        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        found.float().square().sum().backward()
        assert seen == [torch.bfloat16]
        return (found.float() - expected).square().mean()

    assert error("sdpa_fp32") < 2 * error("sdpa")
    assert error("sdpa_fp32") < 1e-4 * expected.square().mean()
