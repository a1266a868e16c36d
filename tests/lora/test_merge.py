import pytest
import torch

from lorasweep.lora import LoraConfig, inject_lora, lora_layers, merge_lora

# Bits of each number of a dtype, the leading one included.
BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
SUM_ERROR = 2**-20
"""Most that a product of rank 2 in fp32 loses of the sum of the absolute terms: a few 2^-24."""


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"1.up": 3}}])
def test_merged_weights_are_the_exact_ones_rounded_once(model, fill_b, dtype, settings):
    model.to(dtype)
    inject_lora(model, LoraConfig(rank=2, **settings))
    fill_b(model)
    exact, slack = {}, {}
    for name, layer in lora_layers(model).items():
        weight, (lora_a, lora_b) = layer.weight.double(), (layer.lora_a.double(), layer.lora_b.double())
        exact[name] = weight + layer.scaling * lora_b @ lora_a
        slack[name] = (weight.abs() + layer.scaling * lora_b.abs() @ lora_a.abs()) * SUM_ERROR
    merge_lora(model)
    for name, expected in exact.items():
        weight = model.get_submodule(name).weight
        assert weight.dtype is dtype
        _, exponent = torch.frexp(expected)
        half_spacing = torch.ldexp(torch.full_like(expected, 0.5), exponent - BITS[dtype])
        assert ((weight.double() - expected).abs() <= half_spacing + slack[name]).all()


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ("out",)}])
def test_a_merged_model_is_a_plain_one_with_the_same_output(make_model, tokens, fill_b, settings):
    model, base = make_model(), make_model()
    inject_lora(model.double(), LoraConfig(rank=2, **settings))
    fill_b(model.double())
    adapted = model(tokens)
    merge_lora(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(tokens), adapted, rtol=1e-12, atol=1e-12)  # float64: 5 products, values up to 100


def test_eval_does_not_merge_and_merging_leaves_a_tied_weight_alone(model, fill_b):
    model.out.weight = model.embed.weight
    inject_lora(model, LoraConfig(rank=2, targets=("out",)))
    fill_b(model)
    tied, before = model.embed.weight, model.embed.weight.clone()
    model.eval()
    assert model.out.base.weight is tied
    merge_lora(model)
    assert model.embed.weight is tied
    assert torch.equal(tied, before)
    assert not torch.equal(model.out.weight, before)
    with pytest.raises(ValueError, match="must have LoRA layers"):
        merge_lora(model)
