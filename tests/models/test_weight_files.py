"""A base on the meta device has the structure, buffers and fingerprint of the whole one; its weights stay in files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from lorasweep.config.compose import compose_run
from lorasweep.models.load import load_base
from lorasweep.models.weight_files import WeightFiles, build_on_meta
from lorasweep.training.fsdp import read_weight
from lorasweep.training.module import prepare_model

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def config():
    return compose_run({"trainer.precision": "fp32", "method.modules_to_save": ["model.norm"]})


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def bases(request, config):
    """The embedded base whole and on the meta device."""
    return [load_base(config.model, dtype=request.param, on_meta=on_meta) for on_meta in (False, True)]


def test_a_base_on_meta_is_the_same_model(bases):
    whole, on_meta = bases
    assert on_meta.fingerprint == whole.fingerprint
    assert on_meta.num_parameters == whole.num_parameters
    assert whole.files is None
    assert all(parameter.is_meta for parameter in on_meta.model.parameters())
    assert list(on_meta.model.state_dict()) == list(whole.model.state_dict())
    for found, expected in zip(on_meta.model.buffers(), whole.model.buffers(), strict=True):
        assert torch.equal(found, expected)
    assert on_meta.model.config.to_dict() == whole.model.config.to_dict()
    assert on_meta.model.generation_config == whole.model.generation_config


def test_what_trains_is_drawn_as_on_a_whole_base_and_the_rest_is_read(bases, config):
    whole, on_meta = (prepare_model(config, base) for base in bases)
    expected = dict(whole.named_parameters())
    for name, parameter in on_meta.named_parameters():
        assert (parameter.dtype, parameter.requires_grad) == (expected[name].dtype, expected[name].requires_grad)
        found = read_weight(parameter, name, bases[1].files) if parameter.is_meta else parameter
        assert torch.equal(found, expected[name]), name


def test_weights_in_several_files_are_found(tmp_path):
    settings = LlamaConfig(**LLAMA)
    model = AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    files = WeightFiles(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(files.read(name), tensor)
    assert files.get_shape("missing") is None


@pytest.mark.parametrize("change", ["rename", "reshape"])
def test_files_that_need_converting_are_left_to_transformers(tmp_path, change):
    settings = LlamaConfig(**LLAMA)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    weights |= {"norm.weight": norm} if change == "rename" else {"model.norm.weight": norm[:3]}
    save_file(weights, tmp_path / "model.safetensors")
    assert build_on_meta(AutoModelForCausalLM, settings, tmp_path, dtype=torch.float32, may_lack_head=True) is None


def test_a_classifier_may_lack_its_head(tmp_path):
    settings = BertConfig(**BERT)
    model = AutoModelForSequenceClassification.from_config(settings)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier")}
    save_file(weights, tmp_path / "model.safetensors")
    given = {"dtype": torch.float32}
    found = build_on_meta(AutoModelForSequenceClassification, settings, tmp_path, may_lack_head=True, **given)
    assert found is not None
    assert found[1] == ("classifier",)
    assert build_on_meta(AutoModelForSequenceClassification, settings, tmp_path, may_lack_head=False, **given) is None
