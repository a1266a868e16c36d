"""Attention follows a rule of device and length, and nothing else of the model changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasweep.models.attention import MAX_EAGER_TOKENS, choose_attention
from lorasweep.models.load import Labels, fingerprint_weights, load_base

LABELS = Labels(kind="single_label", names=("a", "b"))
CPU = torch.device("cpu")


@pytest.fixture
def load(save_random, model_config):
    def load(architecture, kind="causal_lm", **settings):
        labels = LABELS if kind == "classifier" else None
        config = model_config(save_random(architecture), kind=kind, **settings)
        return load_base(config, dtype=torch.float32, labels=labels)

    return load


@pytest.mark.parametrize(
    ("device", "lengths", "name"),
    [
        ("cpu", [15, 15, 900], "eager"),
        ("cpu", [MAX_EAGER_TOKENS], "eager"),
        ("cpu", torch.tensor([900, MAX_EAGER_TOKENS + 1, 15]), "sdpa"),
        ("cuda", [15], "sdpa"),
    ],
)
@pytest.mark.parametrize("before", ["auto", "eager"])
def test_short_examples_on_a_cpu_get_eager_and_all_others_sdpa(load, device, lengths, name, before):
    model = load("llama", attention=before).model
    choice = choose_attention(model, lengths=lengths, device=torch.device(device))
    assert choice.name == model.config._attn_implementation == name
    assert str(int(torch.as_tensor(lengths).median())) in choice.reason
    assert choose_attention(model, lengths=lengths, device=torch.device(device)) == choice


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "causal_lm"),
        ("gemma3", "causal_lm"),
        ("gpt2", "classifier"),
        ("bert", "classifier"),
        ("t5", "seq2seq"),
    ],
)
def test_nothing_else_of_the_model_changes(load, architecture, kind):
    model = load(architecture, kind).model
    before, modes = fingerprint_weights(model), [module.training for module in model.modules()]
    stream = torch.get_rng_state()
    assert choose_attention(model, lengths=[5, 9, 12, 12], device=CPU).name == "eager"
    assert fingerprint_weights(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), stream)


def test_model_of_another_make_has_no_choice():
    choice = choose_attention(nn.Linear(2, 2), lengths=[8], device=CPU)
    assert choice == ("custom", "the model is not from transformers")


def test_model_with_one_implementation_keeps_it(load, monkeypatch):
    model = load("llama", attention="eager").model

    def refuse(name):
        if name != "eager":
            raise ValueError("does not support sdpa")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    assert choose_attention(model, lengths=[900], device=CPU) == ("eager", "the model has no other implementation")
