"""The base model loads frozen and in one dtype, and a model that can't be loaded is one sentence."""

import json
import os
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorasweep.config.run import ModelConfig
from lorasweep.errors import ConfigError
from lorasweep.models import load as load_file
from lorasweep.models.load import find_folder, fingerprint_weights, load_base
from lorasweep.models.tiny.pretrain import build_tokenizer


def make_config(path="embedded:tiny", **settings):
    return ModelConfig(**({"name": "tiny", "path": str(path), "revision": None, "attention": "auto"} | settings))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small random Llama with the byte tokenizer, in a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            eos_token_id=256,
            bos_token_id=256,
        )
    )
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "model")


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedded_model_is_frozen_in_evaluation_mode_and_one_dtype(dtype):
    base = load_base(make_config(), dtype=dtype)
    assert {parameter.dtype for parameter in base.model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert base.path == "embedded:tiny"
    assert 900_000 <= base.num_parameters <= 1_500_000


def test_rotary_frequencies_stay_fp32(saved):
    model = load_base(make_config(saved), dtype=torch.bfloat16).model
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_embedded_model_is_byte_level():
    tokenizer = load_base(make_config(), dtype=torch.bfloat16).tokenizer
    assert tokenizer("aü\n", add_special_tokens=False)["input_ids"] == list("aü\n".encode())
    assert tokenizer.eos_token_id == 256


def test_forward_gives_logits_and_keeps_no_cache(saved):
    base = load_base(make_config(saved), dtype=torch.float32)
    output = base.model(input_ids=torch.zeros(2, 3, dtype=torch.int64))
    assert output.logits.shape == (2, 3, 257)
    assert output.past_key_values is None


def test_weights_are_those_on_disk(saved):
    loaded = load_base(make_config(saved), dtype=torch.float32).model.state_dict()
    original = LlamaForCausalLM.from_pretrained(saved).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for(saved, attention):
    assert (
        load_base(make_config(saved, attention=attention), dtype=torch.float32).model.config._attn_implementation
        == attention
    )


def test_loading_prints_nothing_and_sets_no_environment(saved, capfd):
    before = dict(os.environ)
    load_base(make_config(saved), dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before


def test_tied_weights_count_once(saved):
    base = load_base(make_config(saved), dtype=torch.float32)
    embeddings = 257 * 16
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert base.num_parameters == embeddings + 2 * layer + 16


def test_fingerprint_moves_with_any_weight_and_with_nothing_else(saved):
    config = make_config(saved)
    base = load_base(config, dtype=torch.bfloat16)
    assert load_base(config, dtype=torch.bfloat16).fingerprint == base.fingerprint
    weight = base.model.get_submodule("model.layers.1.mlp.up_proj").weight
    weight.data[3, 4] = weight.data[3, 4].nextafter(torch.tensor(9.0, dtype=weight.dtype))
    assert fingerprint_weights(base.model) != base.fingerprint


def test_missing_embedded_model_lists_those_there_are():
    with pytest.raises(
        ConfigError, match=r"`model.path` must name an embedded model \(tiny\), but got 'embedded:tony'"
    ):
        load_base(make_config("embedded:tony"), dtype=torch.float32)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "~/nothing-of-that-name", "a/b/c", "a\\b"])
def test_missing_folder_is_not_looked_for_on_the_hub(path):
    with pytest.raises(ConfigError, match="there is no folder '"):
        find_folder(make_config(path))


def test_file_is_not_a_folder(saved, monkeypatch):
    monkeypatch.chdir(saved)
    with pytest.raises(ConfigError, match=r"there is no folder 'config\.json'"):
        find_folder(make_config("config.json"))


def test_folder_in_the_home_is_found(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert find_folder(make_config(f"~/{saved.name}")) == saved


def test_revision_of_a_folder_is_refused(saved):
    with pytest.raises(ConfigError, match=r"`model.revision` must be null .* but got 'v1' .* no effect"):
        find_folder(make_config(saved, revision="v1"))


def damage_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_weights(folder):
    torch.save({"lm_head.weight": torch.zeros(257, 16)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGES = {
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "can't be loaded"),
    "cut off weights": (damage_weights, "Error while deserializing header"),
    "pickle only": (pickle_weights, r"no file named model\.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no file named model\.safetensors"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "unknown architecture": (lambda folder: change_config(folder, model_type="zzz"), "model type `zzz`"),
    "other shape": (
        lambda folder: change_config(folder, intermediate_size=32),
        "6 of its weights .* 'model.layers.0.mlp",
    ),
    "more layers": (lambda folder: change_config(folder, num_hidden_layers=3), "9 of its weights .* 'model.layers.2"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_one_sentence(folder, damage, capfd):
    apply, reason = DAMAGES[damage]
    apply(folder)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_base(make_config(folder), dtype=torch.float32)
    assert str(caught.value).startswith("`model.path` must be a causal language model in safetensors")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path):
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    with pytest.raises(ConfigError, match="can't be loaded"):
        load_base(make_config(folder), dtype=torch.float32)
    assert not (tmp_path / "ran").exists()


class Hub:
    """Stands for the hub's client; keeps what was asked for."""

    def __init__(self, error=None):
        self.asked = []
        self.error = error

    def __call__(self):
        return self

    def model_info(self, path, *, revision, timeout):
        self.asked.append((path, revision))
        if self.error:
            raise self.error


@pytest.mark.parametrize("path", ["nobody/nothing", "nothing", "bad id!"])
def test_unreachable_hub_is_one_sentence_after_one_try(path, monkeypatch):
    hub = Hub(ConnectionError("no network\nmore"))
    monkeypatch.setattr(load_file, "HfApi", hub)
    with pytest.raises(ConfigError, match=f"'{path}' is not \\(no network\\)"):
        load_base(make_config(path, revision="v1"), dtype=torch.float32)
    assert hub.asked == [(path, "v1")]


def test_model_in_the_hub_cache_is_loaded_without_asking(saved, monkeypatch):
    hub = Hub(AssertionError("asked"))
    monkeypatch.setattr(load_file, "HfApi", hub)
    monkeypatch.setattr(load_file, "try_to_load_from_cache", lambda path, name, *, revision: str(saved / name))
    assert load_base(make_config("owner/name", revision="v1"), dtype=torch.float32).path == "owner/name"
    assert hub.asked == []


def test_model_that_the_hub_has_is_loaded_from_it(saved, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(load_file, "HfApi", hub)
    sources = []

    def load(kind, source, *, dtype, revision):
        sources.append((source, revision))
        raise OSError("stop here")

    monkeypatch.setattr(load_file, "load_pretrained", load)
    with pytest.raises(ConfigError, match="'owner/name' can't be loaded: stop here"):
        load_base(make_config("owner/name"), dtype=torch.float32)
    assert hub.asked == [("owner/name", None)]
    assert sources == [("owner/name", "main")]
