from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorasweep.lora import LoraConfig, inject_lora, lora_layers, merge_check, merge_lora, remove_lora, unmerge_lora
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
        weight, (lora_a, lora_b) = layer.weight.double(), (matrix.double() for matrix in layer.matrices())
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


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # outputs reach 10; products are summed in another order
    [(torch.float64, 1e-12), (torch.float32, 1e-5)],
)
def test_merged_equals_unmerged(model: nn.Module, tokens: Tensor, fill_b, dtype: torch.dtype, tolerance: float) -> None:
    model.to(dtype)
    inject_lora(model, LoraConfig(rank=2))
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
    inject_lora(model, LoraConfig(rank=2, targets="out"))
    fill_b(model)
    before = model.embed.weight.clone()
    merge_lora(model)
    assert torch.equal(model.embed.weight, before)
    assert not torch.equal(model.out.base.weight, before)
    unmerge_lora(model)
    assert model.out.base.weight is model.embed.weight


def test_merging_out_of_turn_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="must have LoRA layers, but got none"):
        merge_lora(model)
    inject_lora(model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"must be merged, but 'layers.0.up' is not. Call `merge_lora` first"):
        unmerge_lora(model)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"must not be merged, but 'layers.0.up' is. Call `unmerge_lora`"):
        merge_lora(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variant": "dora"},
        {"init": "pissa"},
        {"targets": ("up[0:4,8:12]", "embed")},
        {"modules_to_save": ("out",)},
        {"bias": "all"},
    ],
    ids=str,
)
def test_merge_check_is_small_and_leaves_the_model_alone(make_model, tokens: Tensor, fill_b, settings: dict) -> None:
    model = make_model()
    inject_lora(model, LoraConfig(rank=2, dropout=0.5, **settings))
    fill_b(model)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    assert 0 <= merge_check(model, tokens) < 1e-5  # outputs reach 10: a few neighbours in fp32
    assert model.training
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_check_sees_the_rounding_of_weights_and_not_of_activations(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
    inject_lora(model, LoraConfig(rank=2, targets="0"))
    nn.init.normal_(model[0].lora_b)
    x = torch.randn(16, 64, dtype=dtype)
    exact = model[0].weight.double() + model[0].scaling * (model[0].lora_b.double() @ model[0].lora_a.double())
    expected = (x.double() @ (exact.to(dtype).double() - exact).t()).abs().max().item()
    # outputs reach 30, of which fp32 loses a few 2^-24
    assert merge_check(model, x) == pytest.approx(expected, abs=1e-4)
    assert expected > 10 * 1e-4
    assert {p.dtype for p in (model[0].base.weight, x)} == {dtype}


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


def test_merge_check_reads_logits_of_any_output() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self, kind: type) -> None:
            super().__init__()
            self.layer, self.kind = nn.Linear(4, 4), kind

        def forward(self, x: Tensor) -> object:
            y = self.layer(x)
            return Output(y) if self.kind is Output else self.kind([y, None])

    for kind in (Output, tuple, list):
        model = Wrapped(kind)
        inject_lora(model, LoraConfig(rank=2))
        nn.init.normal_(model.layer.lora_b)
        assert merge_check(model, x=torch.randn(2, 4)) < 1e-5


def test_merge_check_unmerges_when_the_model_fails(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    inject_lora(model, LoraConfig(rank=2))
    calls = iter([torch.zeros(1)])
    monkeypatch.setattr(model, "forward", lambda tokens: next(calls))
    with pytest.raises(StopIteration):
        merge_check(model, torch.zeros(1))
    assert not any(layer.merged for layer in lora_layers(model).values())
    assert model.training


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("settings", [{}, {"variant": "dora"}, {"modules_to_save": ("out",)}], ids=str)
def test_removing_keeps_or_drops_the_change(make_model, tokens: Tensor, fill_b, settings: dict, merged: bool) -> None:
    for keep_change in (True, False):
        model, base = make_model(), make_model()
        inject_lora(model, LoraConfig(rank=2, **settings))
        fill_b(model)
        adapted = model(tokens)
        if merged:
            merge_lora(model)
        remove_lora(model, keep_change=keep_change)
        assert model.state_dict().keys() == base.state_dict().keys()
        assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
        if keep_change:
            torch.testing.assert_close(model(tokens), adapted)
        else:
            assert torch.equal(model(tokens), base(tokens))
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))


def test_trained_biases_cannot_be_dropped(model: nn.Module) -> None:
    inject_lora(model, LoraConfig(rank=2, bias="lora_only"))
    with pytest.raises(ValueError, match=r"`method.bias` must be none to go back to the base"):
        remove_lora(model, keep_change=False)
    remove_lora(model, keep_change=True)
    with pytest.raises(ValueError, match="must have LoRA layers, but got none"):
        remove_lora(model, keep_change=True)
