"""`bitfit`: the biases train and nothing else; a model without them is refused, or its norms train."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lorasweep.config.method import BitfitConfig
from lorasweep.errors import ConfigError
from lorasweep.methods import METHODS

from .conftest import as_base, make_base

METHOD = METHODS["bitfit"]
BIASES, NORMS = BitfitConfig(), BitfitConfig(train="biases_and_norms")


def make_bert(*, dtype=torch.float32):
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return as_base(BertForSequenceClassification(settings).to(dtype))


def prepare(base, config):
    return METHOD.prepare(base, config, generator=torch.Generator())


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_biases_train_and_norms_where_they_are_asked_for():
    base = make_bert()
    expected = {name for name, _ in base.model.named_parameters() if name.endswith(".bias")}
    assert trained_names(prepare(base, BIASES)) == expected
    assert "classifier.bias" in expected
    norms = {name for name, _ in base.model.named_parameters() if name.endswith("LayerNorm.weight")}
    assert trained_names(prepare(base, NORMS)) == trained_names(prepare(base, BIASES)) | norms
    llama = trained_names(prepare(make_base(), NORMS))
    assert llama == {name for name, _ in make_base().model.named_parameters() if "norm" in name}
    assert len(llama) == 5


def test_biases_of_other_names_count_and_relative_positions_do_not():
    attention = nn.MultiheadAttention(8, 2)
    attention.relative_attention_bias = nn.Embedding(4, 2)
    assert trained_names(prepare(as_base(attention), BIASES)) == {"in_proj_bias", "out_proj.bias"}


def test_model_without_biases_is_refused_with_what_to_do():
    base = make_base()
    with pytest.raises(
        ConfigError, match=r"`method.train=biases` .* LlamaForCausalLM .*biases_and_norms.*`method=lora`"
    ):
        prepare(base, BIASES)
    with pytest.raises(ConfigError, match=r"`method.train=biases_and_norms` .* Linear .*`method=lora`"):
        METHOD.check(nn.Linear(2, 2, bias=False), NORMS)
