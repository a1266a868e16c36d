from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorasweep.lora import LoraConfig, inject_lora, lora_layers, merge_lora, unmerge_lora


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


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # outputs reach 10, where neighbours in bf16 are 2^-4 apart; in fp32 products are summed in another order
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4 * 2**-4)],
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
    with pytest.raises(ValueError, match=r"must be merged, but 'layers.0.up' is otherwise. Call `merge_lora` first"):
        unmerge_lora(model)
    merge_lora(model)
    with pytest.raises(ValueError, match=r"must not be merged, but 'layers.0.up' is otherwise. Call `unmerge_lora`"):
        merge_lora(model)
