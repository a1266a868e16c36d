from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorasweep.lora import LoraConfig, inject_lora, lora_layers, merge_lora, remove_lora, unmerge_lora
from lorasweep.lora.merge import weights_in_fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_restores_the_base_bit_for_bit(model: nn.Module, fill_b, dtype: torch.dtype) -> None:
    model.to(dtype)
    inject_lora(model, LoraConfig(rank=2))
    fill_b(model)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    for _ in range(3):
        merge_lora(model)
        unmerge_lora(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())


# Bits of each number of a dtype, the leading one included.
BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
SUM_ERROR = 2**-20
"""Most that a product of rank 2 in fp32, and a row's length, lose of the sum of the absolute terms: a few 2^-24."""


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("settings", [{}, {"variant": "dora"}, {"init": "pissa"}, {"targets": ("up[0:4,8:12]",)}])
def test_merged_weights_are_the_exact_ones_rounded_once(model: nn.Module, fill_b, dtype: torch.dtype, settings) -> None:
    model.to(dtype)
    inject_lora(model, LoraConfig(rank=2, **settings))
    fill_b(model)
    exact, slack = {}, {}
    for name, layer in lora_layers(model).items():
        weight, (lora_a, lora_b) = layer.weight.double(), (matrix.double() for matrix in layer.get_plain_matrices())
        exact[name] = weight + layer.scaling * lora_b @ lora_a
        slack[name] = (weight.abs() + layer.scaling * lora_b.abs() @ lora_a.abs()) * SUM_ERROR
        if layer.magnitude is not None:
            factors = (layer.magnitude.double() / torch.linalg.vector_norm(exact[name], dim=1))[:, None]
            exact[name], slack[name] = exact[name] * factors, slack[name] * factors
    merge_lora(model)
    for name, layer in lora_layers(model).items():
        assert layer.weight.dtype is dtype
        _, exponent = torch.frexp(exact[name])
        half_spacing = torch.ldexp(torch.full_like(exact[name], 0.5), exponent - BITS[dtype])
        assert ((layer.weight.double() - exact[name]).abs() <= half_spacing + slack[name]).all()


SETTINGS = [{}, {"variant": "dora"}, {"init": "pissa"}, {"targets": ("up[0:4,8:12]", "embed")}, {"bias": "all"}]


@pytest.mark.parametrize(
    ("settings", "dtype", "tolerance"),
    # outputs reach 10; products are summed in another order
    [({}, torch.float64, 1e-12), *((settings, torch.float32, 1e-5) for settings in SETTINGS)],
)
def test_merged_equals_unmerged(make_model, tokens: Tensor, fill_b, settings: dict, dtype, tolerance: float) -> None:
    model = make_model().to(dtype)
    inject_lora(model, LoraConfig(rank=2, **settings))
    fill_b(model)
    adapted = model(tokens)
    merge_lora(model)
    assert "merged=True" in repr(model)
    torch.testing.assert_close(model(tokens), adapted, rtol=0, atol=tolerance)


def test_eval_does_not_merge(model: nn.Module, fill_b) -> None:
    inject_lora(model, LoraConfig(rank=2))
    fill_b(model)
    before = [layer.base.weight.clone() for layer in lora_layers(model).values()]
    model.eval()
    assert all(torch.equal(layer.base.weight, w) for layer, w in zip(lora_layers(model).values(), before, strict=True))


def test_merging_leaves_a_tied_weight_alone(model: nn.Module, fill_b) -> None:
    model.out.weight = model.embed.weight
    inject_lora(model, LoraConfig(rank=2, targets=("out",)))
    fill_b(model)
    before = model.embed.weight.clone()
    merge_lora(model)
    assert torch.equal(model.embed.weight, before)
    assert not torch.equal(model.out.base.weight, before)
    unmerge_lora(model)
    assert model.out.base.weight is model.embed.weight


def test_merging_out_of_turn_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="must have LoRA layers"):
        merge_lora(model)
    inject_lora(model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"'layers.0.up' is not. Call `merge_lora`"):
        unmerge_lora(model)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"'layers.0.up' is. Call `unmerge_lora`"):
        merge_lora(model)


def test_weights_are_in_fp32_for_a_while_and_the_same_tensors_again(model: nn.Module) -> None:
    model.bfloat16()
    model.out.weight = model.embed.weight
    model.register_buffer("seen", torch.ones(1, dtype=torch.float16))
    model.register_buffer("steps", torch.ones(1, dtype=torch.int64))
    model.layers[0].double()
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    wide = {"layers.0.up.weight", "layers.0.proj.weight", "layers.0.proj.bias", "steps"}
    with weights_in_fp32(model):
        for name, tensor in model.state_dict().items():
            assert tensor.dtype is (state[name][1].dtype if name in wide else torch.float32)
            assert torch.equal(tensor, state[name][1].to(tensor.dtype))
        assert model.out.weight is model.embed.weight
    with pytest.raises(KeyError), weights_in_fp32(model):
        raise KeyError
    for name, tensor in model.state_dict().items():
        assert (tensor.dtype, tensor.data_ptr()) == (state[name][1].dtype, state[name][0])
        assert torch.equal(tensor, state[name][1])


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("settings", [{}, {"variant": "dora"}, {"modules_to_save": ("out",)}], ids=str)
def test_removing_keeps_or_drops_the_change(make_model, tokens: Tensor, fill_b, settings: dict, merged: bool) -> None:
    for merge in (True, False):
        model, base = make_model(), make_model()
        inject_lora(model, LoraConfig(rank=2, **settings))
        fill_b(model)
        adapted = model(tokens)
        if merged:
            merge_lora(model)
        remove_lora(model, merge=merge)
        assert model.state_dict().keys() == base.state_dict().keys()
        assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
        if merge:
            torch.testing.assert_close(model(tokens), adapted)
        else:
            assert torch.equal(model(tokens), base(tokens))
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))


def test_trained_biases_cannot_be_dropped(model: nn.Module) -> None:
    inject_lora(model, LoraConfig(rank=2, bias="lora_only"))
    with pytest.raises(ValueError, match=r"`method.bias` must be 'none'"):
        remove_lora(model, merge=False)
    remove_lora(model, merge=True)
    with pytest.raises(ValueError, match="must have LoRA layers"):
        remove_lora(model, merge=True)
