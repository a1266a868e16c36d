import copy

import pytest
import torch
from torch import nn

from lorasweep.lora import LoraConfig, LoraLayer, inject_lora, lora_layers


def train_steps(model, tokens, *, num_steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(num_steps):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_lowers_the_loss_and_leaves_the_base_bit_identical(make_model, tokens):
    model, base = make_model(), make_model()
    coverage = inject_lora(model, LoraConfig(rank=2, dropout=0.1))
    trains = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trains} == {"lora_a", "lora_b"}
    assert sum(trains.values()) == coverage.trainable_params
    losses = train_steps(model, tokens)
    assert losses[-1] < losses[0]
    after = {name.replace(".base.", "."): p for name, p in model.named_parameters() if "lora_" not in name}
    assert after.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(after[name], p) for name, p in base.named_parameters())


def test_two_copies_that_share_frozen_tensors_do_not_meet(model, tokens):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    share = {id(parameter): parameter for parameter in model.parameters()}
    one, two = copy.deepcopy(model, dict(share)), copy.deepcopy(model, dict(share))
    before = model(tokens)
    inject_lora(one, LoraConfig(rank=2))
    inject_lora(two, LoraConfig(rank=4))
    train_steps(one, tokens)
    assert torch.equal(model(tokens), before)
    assert torch.equal(two(tokens), before)
    assert not torch.equal(one(tokens), before)
    first, second = (lora_layers(m)["layers.0.up"] for m in (one, two))
    assert first.base.weight is second.base.weight is model.layers[0].up.weight


def test_a_layer_used_under_two_names_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared})
    inject_lora(model, LoraConfig(rank=2))
    assert isinstance(model["first"], LoraLayer)
    assert model["first"] is model["second"]
    assert len(lora_layers(model)) == 1


def test_a_rank_may_be_above_a_layers_size_if_allowed_and_injecting_twice_is_refused(model):
    inject_lora(model, LoraConfig(rank=9, targets=("layers.0.up",)), allow_full_rank=True)
    assert lora_layers(model)["layers.0.up"].rank == 9
    with pytest.raises(ValueError, match=r"no LoRA layers yet, but 'layers.0.up' is one"):
        inject_lora(model, LoraConfig(rank=2))
