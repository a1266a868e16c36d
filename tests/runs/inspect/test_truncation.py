"""Models whose change is cut to a rank: against dense weights cut by numpy, whole again at full rank, the base at 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lorasweep.config.method import BitfitConfig, FullConfig, HeadConfig, IntrinsicConfig
from lorasweep.lora import LoraConfig, inject_lora, lora_layers
from lorasweep.lora.layer_kinds import weight_to_matrix
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.methods.intrinsic import Coordinates
from lorasweep.runs.inspect.changes import weight_changes
from lorasweep.runs.inspect.spectrum import decompose
from lorasweep.runs.inspect.truncation import (
    TruncatedScore,
    Truncation,
    changes_to_cut,
    score_truncated,
    truncated_model,
)

from .conftest import lora

TOKENS = torch.arange(24).reshape(2, 12)
CONFIGS = [
    lora(rank=4),
    lora(rank=4, init="pissa"),
    lora(rank=4, variant="dora"),
    lora(rank=3, targets=("q_proj", "embed_tokens")),
    FullConfig(),
    HeadConfig(),
]


def decompose_changes(changes):
    return {change.name: decompose(change.left, change.right) for change in changes if change.is_matrix}


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def cut(model, base, rank):
    changes = weight_changes(model, base.model)
    if any(isinstance(module, Coordinates) for module in model.modules()):
        METHODS["intrinsic"].merge(model)
    return truncated_model(model, changes_to_cut(changes), decompose_changes(changes), rank=rank)


@pytest.mark.parametrize("config", [*CONFIGS, IntrinsicConfig(dim=40, form="said")], ids=str)
def test_cut_to_the_full_rank_a_model_is_what_it_was(base, trained, config):
    model = trained(config)
    expected = logits(model)
    # two fp32 factors instead of the trained ones round elsewhere; logits are of size 10
    torch.testing.assert_close(logits(cut(model, base, 99)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [config for config in CONFIGS if config != FullConfig()], ids=str)
def test_cut_to_rank_zero_a_model_is_its_base(base, trained, config):
    torch.testing.assert_close(logits(cut(trained(config), base, 0)), logits(base.model))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_layers_change_is_the_nearest_of_that_rank(base, trained, config, rank):
    model = trained(config)
    before = weight_changes(model, base.model)
    after = {change.name: change for change in weight_changes(cut(model, base, rank), base.model)}
    for change in changes_to_cut(before):
        dense = (change.left if change.right is None else change.left @ change.right.double()).detach().numpy()
        u, s, vh = np.linalg.svd(dense)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        found = after[change.name]
        found = found.left if found.right is None else found.left @ found.right.double()
        # the factors and weights that are put in place are fp32, of size 1
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=2e-6)


def test_cutting_changes_neither_the_model_nor_the_base(base, trained):
    for config in CONFIGS:
        model = trained(config)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        frozen = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
        random = torch.random.get_rng_state()
        cut(model, base, 1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(torch.equal(tensor, frozen[name]) for name, tensor in base.model.state_dict().items())
        assert torch.equal(torch.random.get_rng_state(), random)


def test_tied_weights_stay_tied(base, trained):
    model = cut(trained(FullConfig()), base, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    difference = weight_to_matrix(model.model.embed_tokens, model.lm_head.weight - base.model.lm_head.weight)
    assert np.linalg.matrix_rank(difference.detach().numpy(), tol=1e-4) == 2


def test_what_trains_beside_lora_is_left_as_it_was_trained(base, trained):
    model = trained(lora(targets=("q_proj",), modules_to_save=("lm_head", "embed_tokens")))
    whole = cut(model, base, 0)
    assert not lora_layers(whole)
    assert torch.equal(whole.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(whole.lm_head.weight, base.model.lm_head.weight)


def test_a_new_head_is_left_as_it_was_trained(base, trained):
    changes = weight_changes(trained(FullConfig()), base.model)
    names = {change.name for change in changes_to_cut(changes, head=("model.layers.0",))}
    assert {name.rpartition(".")[2] for name in names} >= {"q_proj", "embed_tokens"}
    assert not any(name.startswith("model.layers.0.") for name in names)


def test_parts_of_a_fused_projection_are_cut_each_for_itself():
    fused = nn.Sequential(nn.Linear(6, 12, bias=False)).requires_grad_(False)
    model = copy_sharing_weights(fused)
    inject_lora(model, LoraConfig(rank=3, alpha=4, targets=("0[q,v]",)), generator=torch.Generator())
    with torch.no_grad():
        model[0].lora_b.add_(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    changes = weight_changes(model, fused)
    parts = decompose_changes(changes)
    change = truncated_model(model, changes, parts, rank=1)[0].change().detach()
    assert not change[4:8].any()
    assert [np.linalg.matrix_rank(change[rows].numpy(), tol=1e-5) for rows in (slice(4), slice(8, 12))] == [1, 1]
    whole = truncated_model(model, changes, parts, rank=3)[0].change()
    torch.testing.assert_close(whole, model[0].change(), rtol=0, atol=1e-6)  # fp32 factors of size 1


def planted(*values):
    """A model with one layer and a full change of those singular values; its score is the norm of what is missing."""
    base = nn.Sequential(nn.Linear(12, 12, bias=False)).requires_grad_(False)
    model = copy_sharing_weights(base)
    change = torch.diag(torch.tensor([*values, *[0.0] * (12 - len(values))]))
    model[0].weight = nn.Parameter(base[0].weight + change)
    target = model[0].weight.detach().clone()

    def score(cut):
        return torch.linalg.matrix_norm(cut[0].weight.detach() - target).item()

    return model, base, score


def look(values, *, sign=1):
    model, base, score = planted(*values)
    changes = weight_changes(model, base)
    return score_truncated(model, changes, decompose_changes(changes), score=lambda cut: sign * score(cut), sign=sign)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 6, 7, 11])
def test_the_smallest_rank_that_is_enough_is_found_between_powers_of_two(rank, sign):
    found = look([1.0] * rank, sign=sign)
    assert found.enough.rank == rank
    assert {0, 1, 2, 4, 8, 12} <= {row.rank for row in found.scores}
    assert [row.rank for row in found.scores] == sorted({row.rank for row in found.scores})


def test_scores_are_those_of_the_cut_models():
    found = look([4.0, 3.0])
    by_rank = {row.rank: row for row in found.scores}
    # fp32 weights of size 1
    assert [by_rank[rank].score for rank in (0, 1, 2)] == pytest.approx([5.0, 3.0, 0.0], abs=1e-5)
    assert [by_rank[rank].norm_share for rank in (0, 1, 2)] == pytest.approx([0.0, 0.64, 1.0])
    assert found.gain == pytest.approx(5.0, abs=1e-5)
    assert found.kept(by_rank[1]) == pytest.approx(0.4, abs=1e-5)
    assert found.loss(by_rank[1]) == pytest.approx(3.0, abs=1e-5)


def test_a_change_that_gains_nothing_has_no_rank_that_is_enough():
    rows = [TruncatedScore(rank=0, score=1.0, norm_share=0), TruncatedScore(rank=4, score=1.5, norm_share=1)]
    worse = Truncation(scores=tuple(rows), sign=1)
    assert (worse.enough, worse.kept(rows[0]), worse.gain) == (None, None, -0.5)
    better = Truncation(scores=tuple(rows), sign=-1)
    assert better.enough is rows[1]


def test_a_run_that_changed_no_matrix_has_nothing_to_cut(base, trained):
    model = trained(BitfitConfig(train="biases_and_norms"))
    changes = weight_changes(model, base.model)
    assert len(changes) == 5
    assert changes_to_cut(changes) == []
    assert score_truncated(nn.Linear(1, 1), [], {}, score=lambda model: 0.0, sign=1) is None
