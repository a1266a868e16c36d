"""The faster attention is chosen by measurement, and nothing else of the model changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasweep.models import attention as attention_file
from lorasweep.models.attention import choose_attention
from lorasweep.models.load import Labels, fingerprint_weights, load_base

LABELS = Labels(kind="single_label", names=("a", "b"))


@pytest.fixture
def load(save_random, model_config):
    def load(architecture, kind="causal_lm", **settings):
        labels = LABELS if kind == "classifier" else None
        config = model_config(save_random(architecture), kind=kind, **settings)
        return load_base(config, dtype=torch.float32, labels=labels)

    return load


def take(monkeypatch, seconds):
    """Lets each implementation take so long; what is run is kept."""
    seen = []

    def time_step(model, batches):
        seen.append((model.config._attn_implementation, batches, model.training))
        return seconds[model.config._attn_implementation]

    monkeypatch.setattr(attention_file, "_time_step", time_step)
    return seen


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"sdpa": 2.0, "eager": 1.0}, "eager"),
        ({"sdpa": 1.0, "eager": 2.0}, "sdpa"),
        ({"sdpa": 1.0, "eager": 0.96}, "sdpa"),  # within the noise
    ],
)
@pytest.mark.parametrize("before", ["auto", "eager"])
def test_faster_one_is_set_and_a_tie_is_sdpa(load, monkeypatch, seconds, expected, before):
    take(monkeypatch, seconds)
    model = load("llama", attention=before).model
    choice = choose_attention(model, lengths=[12] * 8, rows=4)
    assert choice == (expected, seconds)
    assert model.config._attn_implementation == expected


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
def test_real_steps_are_timed_on_each_kind_of_model(load, architecture, kind):
    model = load(architecture, kind).model
    before, modes = fingerprint_weights(model), [module.training for module in model.modules()]
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    name, measured = choose_attention(model, lengths=[5, 9, 12, 12], rows=2)
    assert name in measured
    assert set(measured) == {"sdpa", "eager"}
    assert all(0 < seconds < 10 for seconds in measured.values())
    assert fingerprint_weights(model) == before
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), stream)


def test_rows_have_the_lengths_of_the_data(load, monkeypatch):
    seen = take(monkeypatch, {"sdpa": 1.0, "eager": 1.0})
    choose_attention(load("llama").model, lengths=[5, 9, 12, 3, 7], rows=2)
    _, batches, training = seen[0]
    assert [batch["attention_mask"].sum(1).tolist() for batch in batches] == [[5, 9], [12, 3], [7]]
    assert [batch["input_ids"].shape for batch in batches] == [(2, 9), (2, 12), (1, 7)]
    assert training  # dropout changes which kernels are used


def test_long_rows_are_measured_on_fewer_of_them(load, monkeypatch):
    seen = take(monkeypatch, {"sdpa": 1.0, "eager": 1.0})
    choose_attention(load("llama").model, lengths=[2048] * 64, rows=64)
    assert [batch["input_ids"].shape for batch in seen[0][1]] == [(1, 2048)] * attention_file.MOST_BATCHES


def test_a_slow_model_is_measured_in_one_round(load, monkeypatch):
    seen = take(monkeypatch, {"sdpa": 1.0, "eager": 1.0})
    monkeypatch.setattr(attention_file, "TIME_LIMIT_S", 0.0)
    choose_attention(load("llama").model, lengths=[8], rows=1)
    assert len(seen) == 2 * 2  # one that warms up and one that counts, of each


def test_model_of_another_make_has_no_choice():
    assert choose_attention(nn.Linear(2, 2), lengths=[8], rows=1) == ("own", {})


def test_model_with_one_implementation_keeps_it(load, monkeypatch):
    model = load("llama", attention="eager").model

    def refuse(name):
        if name != "eager":
            raise ValueError("does not support sdpa")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    assert choose_attention(model, lengths=[8], rows=1) == ("eager", {})
