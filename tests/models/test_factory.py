"""A user's model is built with the function that is named, and then behaves like any other."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import lightning
import pytest
import torch
from tests.tiny_tokenizer import load_tokenizer
from torch import nn

from lorasweep.errors import ConfigError
from lorasweep.methods import copy_sharing_weights
from lorasweep.models.load import Labels, fingerprint_weights, load_base

LABELS = Labels(kind="single_label", names=("a", "b", "c"))
TOKENS = torch.arange(32).reshape(4, 8)


class Bag(nn.Module):
    """Mean of embeddings, one hidden layer, a head; gives a bare tensor."""

    def __init__(self, outputs):
        super().__init__()
        self.embed = nn.Embedding(257, 8)
        self.hidden = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, outputs)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.drop(self.norm(self.hidden(self.embed(input_ids).mean(1)).relu())))


def build(labels):
    return Bag(labels.num_outputs), load_tokenizer(), ("head",)


def build_alone():
    return Bag(3)


def build_tuple():
    class Tuple(Bag):
        def forward(self, input_ids):
            return super().forward(input_ids), "more"

    return Tuple(3)


def build_named():
    class Named(Bag):
        def forward(self, input_ids):
            return SimpleNamespace(logits=super().forward(input_ids), more=1)

    return Named(3)


def build_other():
    return "a text"


def build_unknown_head():
    return Bag(3), None, ("haed",)


class OwnSteps(lightning.LightningModule):
    def training_step(self, batch):
        return 0.0


def build_own_steps():
    return OwnSteps()


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_models", sys.modules[__name__])


@pytest.fixture
def load(model_config):
    def load(name, *, dtype=torch.float32, labels=LABELS, path=None, **settings):
        config = model_config(path, kind="classifier", factory=f"own_models:{name}", **settings)
        return load_base(config, dtype=dtype, labels=labels)

    return load


def test_function_gives_model_tokenizer_and_head(load):
    base = load("build")
    assert base.path == "own_models:build"
    assert base.new_head_names == ("head",)
    assert base.tokenizer("a")["input_ids"] == [97]
    assert base.model.head.out_features == 3
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training


@pytest.mark.parametrize("name", ["build_alone", "build_tuple", "build_named"])
def test_output_has_logits_whatever_forward_returns(load, name):
    base = load(name)
    assert base.tokenizer is None
    assert base.model(input_ids=TOKENS).logits.shape == (4, 3)
    assert copy_sharing_weights(base.model)(input_ids=TOKENS).logits.shape == (4, 3)


def test_what_it_draws_is_the_same_each_time_and_moves_no_stream(load):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = load("build")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert load("build").fingerprint == first.fingerprint
    assert fingerprint_weights(load("build").model) == fingerprint_weights(first.model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("build_other", "nn.Module, .* but 'own_models:build_other' returns str"),
        ("build_unknown_head", "names of modules .* returns 'haed'"),
        ("build_own_steps", "must return the network, .* `training_step`"),
        ("biuld", "no attribute .biuld"),
    ],
)
def test_wrong_function_is_one_sentence(load, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(name)
    assert str(caught.value).startswith("`model.factory` must ")
