"""Models whose update is cut to a rank: against dense weights cut by numpy, whole again at full rank, the base at 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lorasweep.config.method import BitfitConfig, FullConfig, HeadConfig, IntrinsicConfig
from lorasweep.lora import LoraConfig, inject_lora, lora_layers
from lorasweep.lora.layer_kinds import weight_to_matrix
from lorasweep.methods import METHODS, copy_sharing_weights
from lorasweep.methods.intrinsic import IntrinsicParameters
from lorasweep.runs.inspect.truncation import find_enough_rank, score_ranks, select_truncated, truncate_model
from lorasweep.runs.inspect.weight_updates import read_weight_updates

from .conftest import decompose_updates, lora

TOKENS = torch.arange(24).reshape(2, 12)
CONFIGS = [
    lora(rank=4),
    lora(rank=4, init="pissa"),
    lora(rank=4, variant="dora"),
    lora(rank=3, targets=("q_proj", "embed_tokens")),
    FullConfig(),
    HeadConfig(),
]


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def cut(model, base, rank):
    updates = read_weight_updates(model, base.model)
    if any(isinstance(module, IntrinsicParameters) for module in model.modules()):
        METHODS["intrinsic"].merge(model)
    return truncate_model(model, select_truncated(updates), decompose_updates(updates), rank=rank)


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
    before = read_weight_updates(model, base.model)
    after = {update.name: update for update in read_weight_updates(cut(model, base, rank), base.model)}
    for update in select_truncated(before):
        dense = (update.left if update.right is None else update.left @ update.right.double()).detach().numpy()
        u, s, vh = np.linalg.svd(dense)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        found = after[update.name]
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
    updates = read_weight_updates(trained(FullConfig()), base.model)
    names = {update.name for update in select_truncated(updates, head=("model.layers.0",))}
    assert {name.rpartition(".")[2] for name in names} >= {"q_proj", "embed_tokens"}
    assert not any(name.startswith("model.layers.0.") for name in names)


def test_parts_of_a_fused_projection_are_cut_each_for_itself():
    fused = nn.Sequential(nn.Linear(6, 12, bias=False)).requires_grad_(False)
    model = copy_sharing_weights(fused)
    inject_lora(model, LoraConfig(rank=3, alpha=4, targets=("0[q,v]",)), generator=torch.Generator())
    with torch.no_grad():
        model[0].lora_b.add_(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    updates = read_weight_updates(model, fused)
    parts = decompose_updates(updates)
    update = truncate_model(model, updates, parts, rank=1)[0].compute_weight_update().detach()
    assert not update[4:8].any()
    assert [np.linalg.matrix_rank(update[rows].numpy(), tol=1e-5) for rows in (slice(4), slice(8, 12))] == [1, 1]
    whole = truncate_model(model, updates, parts, rank=3)[0].compute_weight_update()
    torch.testing.assert_close(whole, model[0].compute_weight_update(), rtol=0, atol=1e-6)  # fp32 factors of size 1


def planted(*values):
    """A model with one layer and a full update of those singular values; its score is the norm of what is missing."""
    base = nn.Sequential(nn.Linear(12, 12, bias=False)).requires_grad_(False)
    model = copy_sharing_weights(base)
    update = torch.diag(torch.tensor([*values, *[0.0] * (12 - len(values))]))
    model[0].weight = nn.Parameter(base[0].weight + update)
    target = model[0].weight.detach().clone()

    def score(cut):
        return torch.linalg.matrix_norm(cut[0].weight.detach() - target).item()

    return model, base, score


def score_planted(values, *, minimize=True):
    model, base, score = planted(*values)
    updates = read_weight_updates(model, base)
    sign = 1 if minimize else -1
    return score_ranks(
        model, updates, decompose_updates(updates), score=lambda cut: sign * score(cut), minimize=minimize
    )


@pytest.mark.parametrize("minimize", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 6, 7, 11])
def test_the_smallest_rank_that_is_enough_is_found_between_powers_of_two(rank, minimize):
    scores = score_planted([1.0] * rank, minimize=minimize)
    assert find_enough_rank(scores).rank == rank
    assert {0, 1, 2, 4, 8, 12} <= {row.rank for row in scores}
    assert [row.rank for row in scores] == sorted({row.rank for row in scores})


def test_scores_are_those_of_the_truncated_models():
    by_rank = {row.rank: row for row in score_planted([4.0, 3.0])}
    # fp32 weights of size 1
    assert [by_rank[rank].score for rank in (0, 1, 2)] == pytest.approx([5.0, 3.0, 0.0], abs=1e-5)
    assert [by_rank[rank].norm_share for rank in (0, 1, 2)] == pytest.approx([0.0, 0.64, 1.0])
    assert by_rank[1].kept_share == pytest.approx(0.4, abs=1e-5)
    assert by_rank[1].loss == pytest.approx(3.0, abs=1e-5)


def test_an_update_that_gains_nothing_has_no_rank_that_is_enough():
    scores = score_planted([4.0, 3.0], minimize=False)
    model, base, score = planted(4.0, 3.0)
    updates = read_weight_updates(model, base)
    worse = score_ranks(model, updates, decompose_updates(updates), score=score, minimize=False)
    assert find_enough_rank(scores).rank == 2
    assert find_enough_rank(worse) is None
    assert {row.kept_share for row in worse} == {None}


def test_a_run_that_updated_no_matrix_has_nothing_to_truncate(base, trained):
    model = trained(BitfitConfig(train="biases_and_norms"))
    updates = read_weight_updates(model, base.model)
    assert len(updates) == 5
    assert select_truncated(updates) == []
    assert score_ranks(nn.Linear(1, 1), [], {}, score=lambda model: 0.0, minimize=True) == ()
