"""Attention follows a rule of device and length, and nothing else of the model changes."""

import pytest
import torch

from lorasweep.models.load import MAX_EAGER_TOKENS, choose_attention, load_base


@pytest.fixture
def load(save_random, model_config):
    def load(attention):
        return load_base(model_config(save_random("llama"), attention=attention), dtype=torch.float32).model

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
    model = load(before)
    choice = choose_attention(model, lengths=lengths, device=torch.device(device))
    assert choice.name == model.config._attn_implementation == name
    assert str(int(torch.as_tensor(lengths).median())) in choice.reason
    assert choose_attention(model, lengths=lengths, device=torch.device(device)) == choice


def test_model_with_one_implementation_keeps_it(load, monkeypatch):
    model = load("eager")

    def refuse(name):
        if name != "eager":
            raise ValueError("does not support sdpa")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    assert choose_attention(model, lengths=[900], device=torch.device("cpu")) == (
        "eager",
        "the model has no other implementation",
    )
