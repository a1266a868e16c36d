"""The base model loads frozen and in one dtype, and a model that can't be loaded is one sentence."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from httpx2 import Request, Response
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from transformers import Wav2Vec2Config

from lorasweep.errors import ConfigError
from lorasweep.models import load as load_file
from lorasweep.models.load import (
    Labels,
    find_model_folder,
    fingerprint_weights,
    load_base,
    set_dropout_settings,
)
from lorasweep.models.paths import find_local_path

LABELS = Labels(kind="single_label", names=("calm", "loud", "odd"))


@pytest.fixture
def saved(save_random):
    """A small random Llama with the byte tokenizer, in a folder that no test changes."""
    return save_random("llama")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedded_model_is_frozen_in_evaluation_mode_and_one_dtype(dtype, model_config):
    base = load_base(model_config(), dtype=dtype)
    assert {parameter.dtype for parameter in base.model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert base.path == "embedded:tiny"
    assert 900_000 <= base.num_parameters <= 1_500_000


def test_fingerprint_moves_with_any_weight_and_with_nothing_else(saved, model_config):
    config = model_config(saved)
    base = load_base(config, dtype=torch.bfloat16)
    assert load_base(config, dtype=torch.bfloat16).fingerprint == base.fingerprint
    weight = base.model.get_submodule("model.layers.1.mlp.up_proj").weight
    weight.data[3, 4] = weight.data[3, 4].nextafter(torch.tensor(9.0, dtype=weight.dtype))
    assert fingerprint_weights(base.model) != base.fingerprint


def damage_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def write_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def change(**values):
    return lambda folder: change_config(folder, **values)


REFUSED = {
    "cut off weights": (damage_weights, {}, ["Error while deserializing header"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), {}, ["must have weights in safetensors"]),
    "an adapter": (lambda folder: (folder / "adapter_config.json").touch(), {}, ["is an adapter", "lorasweep export"]),
    "broken config": (write_config("{"), {}, ["can't be loaded"]),
    "no config": (write_config("[]"), {}, ["can't be loaded"]),
    "unknown architecture": (change(model_type="zzz"), {}, ["model type `zzz`"]),
    "other shape": (change(intermediate_size=32), {}, ["6 of its weights", "'model.layers.0"]),
    "more layers": (change(num_hidden_layers=3), {}, ["9 of its weights", "'model.layers.2"]),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": 5}'),
        {},
        ["can't be loaded"],
    ),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], {}, ["tokenizer"]),
    "tokenizer of nothing": (change(vocab_size=10**6), {}, ["the files of its tokenizer", "model of 1,000,000"]),
    "own code": (
        change(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}),
        {},
        ["`model.trust_remote_code` must be true", "Python code"],
    ),
    "a revision": (lambda folder: None, {"revision": "v1"}, ["`model.revision` must be null", "'v1'"]),
    "no such attention": (
        lambda folder: None,
        {"attention": "flash_attention_2"},
        ["`model.attention` must be available", "'flash_attention_2'", "model.attention=auto"],
    ),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_a_folder_that_can_not_be_loaded_is_one_sentence(folder, damage, capfd, model_config):
    if damage == "no such attention" and importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed")
    apply, settings, words = REFUSED[damage]
    apply(folder)
    with pytest.raises(ConfigError, match=r"^`model\.\w+` must ") as caught:
        load_base(model_config(folder, **settings), dtype=torch.float32)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "~/nothing-of-that-name", "a/b/c", "config.json"])
def test_missing_folder_is_not_looked_for_on_the_hub(path, folder, monkeypatch, model_config):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"`model\.path` must be a folder") as raised:
        find_local_path(model_config(path))
    assert repr(path) in str(raised.value)


FORBIDDEN = Response(403, request=Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no network\nmore"), r"`model\.path` .*'owner/name' .*: no network\. Check"),
        (GatedRepoError("403", response=FORBIDDEN), r"'owner/name'.* `hf auth login`"),
    ],
)
def test_a_hub_that_gives_nothing_is_one_sentence(monkeypatch, model_config, error, message):
    def fail(path, **settings):
        raise error

    monkeypatch.setattr(load_file, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=message):
        find_model_folder(model_config("owner/name"))


@pytest.mark.parametrize("trusted", [False, True])
def test_only_what_may_be_read_is_downloaded(folder, monkeypatch, model_config, trusted):
    asked = {}
    monkeypatch.setattr(load_file, "snapshot_download", lambda path, **to: asked.update(to, path=path) or str(folder))
    assert find_model_folder(model_config("owner/name", revision="v1", trust_remote_code=trusted)) == folder
    assert (asked["path"], asked["revision"]) == ("owner/name", "v1")
    assert "*.safetensors" in asked["allow_patterns"]
    assert ("*.py" in asked["allow_patterns"]) == trusted


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, Wav2Vec2Config

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

Path({file!r}).touch()
"""


def test_code_that_comes_with_a_model_runs_only_when_it_is_trusted(folder, tmp_path, model_config, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "own.py").write_text(CODE.format(file=str(tmp_path / "ran")))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_config(folder, model_type="own", auto_map=classes)
    with pytest.raises(ConfigError, match=r"`model.trust_remote_code`"):
        load_base(model_config(folder), dtype=torch.float32)
    assert not (tmp_path / "ran").exists()
    base = load_base(model_config(folder, trust_remote_code=True), dtype=torch.float32)
    assert (tmp_path / "ran").exists()
    assert type(base.model).__name__ == "OwnModel"


def test_fingerprint_does_not_count_a_new_head(save_random, model_config):
    config = model_config(save_random("roberta"), kind="classifier")
    two = load_base(config, dtype=torch.float32, labels=Labels(kind="single_label", names=("a", "b")))
    three = load_base(config, dtype=torch.float32, labels=LABELS)
    assert two.fingerprint == three.fingerprint
    assert three.num_parameters - two.num_parameters == 16 + 1


@pytest.fixture
def classifier(save_random, model_config, tmp_path):
    """A folder with a whole classifier of three labels."""
    base = load_base(model_config(save_random("bert"), kind="classifier"), dtype=torch.float32, labels=LABELS)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_head_for_other_labels_is_new_and_a_classifier_that_lacks_a_layer_is_refused(classifier, model_config):
    labels = Labels(kind="single_label", names=("a", "b"))
    base = load_base(model_config(classifier, kind="classifier"), dtype=torch.float32, labels=labels)
    assert base.new_head_names == ("classifier",)
    assert base.model.classifier.out_features == 2
    file = classifier / "model.safetensors"
    tensors = load_tensors(file)
    del tensors["bert.encoder.layer.0.output.dense.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 of its weights .* 'bert\.encoder\.layer\.0\.output\.dense\.bias'"):
        load_base(model_config(classifier, kind="classifier"), dtype=torch.float32)


def test_model_without_padding_pads_with_the_end_of_text(saved, model_config):
    base = load_base(model_config(saved, kind="classifier"), dtype=torch.float32, labels=LABELS)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == base.model.config.pad_token_id == 256
    rows = base.tokenizer(["ab", "abcd"], padding=True, return_tensors="pt")
    alone = base.tokenizer(["ab"], return_tensors="pt")
    with torch.no_grad():
        padded, single = base.model(**rows).logits[0], base.model(**alone).logits[0]
    torch.testing.assert_close(padded, single)  # padding is masked


TOKENS = torch.arange(60, 84).reshape(2, 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_zero_makes_training_mode_the_same_as_evaluation(save_random, model_config, architecture, attention):
    kind = {"bert": "classifier", "gpt2": "causal_lm"}[architecture]
    labels = LABELS if kind == "classifier" else None

    def outputs(dropout):
        config = model_config(save_random(architecture), kind=kind, dropout=dropout, attention=attention)
        model = load_base(config, dtype=torch.float32, labels=labels).model
        torch.manual_seed(0)
        return model.train()(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits

    assert torch.equal(*outputs(0.0))
    assert not torch.allclose(*outputs(None), atol=1e-6)  # the models' own rate is 0.1


def test_rates_of_whole_layers_are_set_only_to_zero():
    settings = Wav2Vec2Config(layerdrop=0.2, hidden_dropout=0.1)
    set_dropout_settings(settings, 0.3)
    assert (settings.layerdrop, settings.hidden_dropout) == (0.2, 0.3)
    set_dropout_settings(settings, 0.0)
    assert (settings.layerdrop, settings.hidden_dropout) == (0.0, 0.0)
