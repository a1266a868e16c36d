"""ΔW of every method against the difference that the model's output or its dense weights show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasweep.config.method import BitfitConfig, FullConfig, IntrinsicConfig
from lorasweep.lora import LoraConfig, inject_lora, lora_layers, merge_lora
from lorasweep.lora.layer_kinds import weight_to_matrix
from lorasweep.methods import copy_sharing_weights
from lorasweep.runs.weight_updates import read_weight_updates

from .conftest import lora


def dense(update):
    return update.left if update.right is None else update.left @ update.right.double()


def merged_difference(model, base):
    """W - W0 of each LoRA layer from the library's own merge, by name."""
    merged = copy_sharing_weights(model)
    merge_lora(merged)
    difference = {}
    for name in lora_layers(model):
        layer, original = merged.get_submodule(name), base.model.get_submodule(name)
        weight = layer.weight.double() - original.weight.double()
        difference[name] = weight_to_matrix(original, weight)
    return difference


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(scaling="alpha_over_sqrt_rank"),
        lora(init="orthogonal"),
        lora(init="pissa"),
        lora(variant="dora"),
        lora(variant="dora", init="pissa"),
        lora(targets=("q_proj", "embed_tokens"), rank_pattern={"q_proj": 3}),
    ],
    ids=str,
)
def test_changes_of_lora_are_what_merging_writes(base, trained, config):
    model = trained(config)
    updates = {update.name: update for update in read_weight_updates(model, base.model)}
    expected = merged_difference(model, base)
    assert updates.keys() == expected.keys()
    for name, difference in expected.items():
        # merging rounds to fp32 once, at weights of size 1
        torch.testing.assert_close(dense(updates[name]).detach(), difference, rtol=0, atol=1e-6)


def test_nothing_is_rounded_to_a_base_in_bf16(base, trained):
    for parameter in base.model.parameters():
        parameter.data = parameter.data.bfloat16()
    model = trained(lora(variant="dora"), step=1e-4)
    for update in read_weight_updates(model, base.model):
        layer = lora_layers(model)[update.name]
        matrix = layer.weight.double() + layer.scaling * (layer.lora_b.double() @ layer.lora_a.double())
        matrix *= (layer.magnitude.double() / torch.linalg.vector_norm(matrix, dim=1))[:, None]
        torch.testing.assert_close(update.left, matrix - layer.weight.double())
        assert update.left.abs().max() < 1e-2  # less than bf16 resolves at 1


def test_parts_of_a_fused_projection_are_changes_of_their_own(base):
    fused = nn.Sequential(nn.Linear(6, 12, bias=False)).requires_grad_(False)
    for init in ("default", "pissa"):
        model = copy_sharing_weights(fused)
        inject_lora(model, LoraConfig(rank=2, alpha=4, targets=("0[q,v]",), init=init), generator=torch.Generator())
        with torch.no_grad():
            model[0].lora_a.add_(torch.randn(4, 6))
            model[0].lora_b.add_(torch.randn(8, 2))
        first, second = read_weight_updates(model, fused)
        assert (first.name, second.name) == ("0[0:4]", "0[8:12]")
        assert (first.rank, first.left.shape[1]) == (2, 2 if init == "default" else 4)
        whole = torch.cat([dense(first), torch.zeros(4, 6).double(), dense(second)])
        expected = model[0].compute_weight_update().double()
        torch.testing.assert_close(whole.detach(), expected.detach(), rtol=0, atol=1e-5)  # the layer's own is fp32
        assert torch.equal(first.base, fused[0].weight[:4])


def test_changes_of_full_are_the_difference_of_every_weight(base, trained):
    model = trained(FullConfig())
    updates = read_weight_updates(model, base.model)
    originals = dict(base.model.named_parameters())
    assert {update.name for update in updates} == {name.removesuffix(".weight") for name in originals}
    for update in updates:
        difference = model.get_parameter(f"{update.name}.weight") - originals[f"{update.name}.weight"]
        owner = base.model.get_submodule(update.name)
        expected = weight_to_matrix(owner, difference) if difference.dim() > 1 else difference
        torch.testing.assert_close(update.left, expected.double(), rtol=0, atol=1e-6)  # of a difference in fp32
        assert update.is_matrix == ("norm" not in update.name)


@pytest.mark.parametrize("form", ["did", "said"])
def test_changes_of_intrinsic_are_projected_and_not_rounded_to_a_base_in_bf16(base, trained, form):
    expected = {
        update.name: update.left
        for update in read_weight_updates(trained(IntrinsicConfig(dim=40, form=form)), base.model)
    }
    for parameter in base.model.parameters():
        parameter.data = parameter.data.bfloat16()
    model = trained(IntrinsicConfig(dim=40, form=form))
    updates = {update.name: update for update in read_weight_updates(model, base.model)}
    names = {name.removesuffix(".weight") for name, _ in base.model.named_parameters()}
    assert updates.keys() == expected.keys() == names
    for name, update in updates.items():
        # fp32 sums at weights of size 1, whatever the base's dtype
        torch.testing.assert_close(update.left, expected[name], rtol=0, atol=1e-6)
        assert update.rank is None


def test_changes_of_bitfit_are_vectors(base, trained):
    updates = read_weight_updates(trained(BitfitConfig(train="biases_and_norms")), base.model)
    assert {update.kind for update in updates} == {"input_layernorm", "post_attention_layernorm", "norm"}
    assert not any(update.is_matrix for update in updates)


def test_what_trains_beside_lora_is_found_under_the_bases_names(base, trained):
    config = lora(targets=("q_proj",), modules_to_save=("model.norm",))
    updates = {update.name: update for update in read_weight_updates(trained(config), base.model)}
    assert updates.keys() == {*(f"model.layers.{index}.self_attn.q_proj" for index in range(2)), "model.norm"}
