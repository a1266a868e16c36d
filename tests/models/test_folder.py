"""A model's files are found in a folder, in the hub's cache or on the hub, in this order, and asked for once."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from httpx2 import Request, Response
from huggingface_hub.errors import GatedRepoError

from lorasweep.errors import ConfigError
from lorasweep.models import folder as folder_file
from lorasweep.models.folder import ModelFiles, find_files, find_folder, find_source


class Hub:
    """Stands for the hub: keeps what was asked for, and gives the files of one folder."""

    def __init__(self, monkeypatch, names=(), *, folder=None, error=None, download_error=None):
        self.asked, self.wanted = [], None
        self.names, self.folder, self.error, self.download_error = names, folder, error, download_error
        monkeypatch.setattr(folder_file, "HfApi", lambda: self)
        monkeypatch.setattr(folder_file, "snapshot_download", self.download)
        monkeypatch.setattr(folder_file, "try_to_load_from_cache", lambda path, name, *, revision: None)

    def model_info(self, path, *, revision, timeout):
        self.asked.append((path, revision))
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def download(self, path, *, revision, allow_patterns):
        if self.download_error:
            raise self.download_error
        self.wanted = sorted(allow_patterns)
        return str(self.folder)


@pytest.fixture
def folder(save_random, tmp_path):
    """A copy of a model's folder, to change."""
    return shutil.copytree(save_random("llama"), tmp_path / "model")


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "~/nothing-of-that-name", "a/b/c", "a\\b"])
def test_missing_folder_is_not_looked_for_on_the_hub(path, model_config):
    with pytest.raises(ConfigError, match="there is no folder '"):
        find_folder(model_config(path))


def test_file_is_not_a_folder(folder, monkeypatch, model_config):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"there is no folder 'config\.json'"):
        find_folder(model_config("config.json"))


def test_folder_in_the_home_is_found(folder, monkeypatch, model_config):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_files(model_config(f"~/{folder.name}")) == ModelFiles(folder=folder, form="safetensors")


def test_revision_of_a_folder_is_refused(folder, model_config):
    with pytest.raises(ConfigError, match=r"`model.revision` must be null unless .* but got 'v1' .* no effect"):
        find_folder(model_config(folder, revision="v1"))


def test_gguf_file_is_found_by_its_own_path_or_by_its_name(folder, model_config):
    (folder / "some.gguf").touch()
    expected = ModelFiles(folder=folder, form="gguf", gguf_file="some.gguf")
    assert find_files(model_config(folder / "some.gguf")) == expected
    assert find_files(model_config(folder, gguf_file="some.gguf")) == expected
    with pytest.raises(ConfigError, match=r"`model.gguf_file` must be null where `model.path` is a GGUF file itself"):
        find_files(model_config(folder / "some.gguf", gguf_file="some.gguf"))
    with pytest.raises(
        ConfigError, match=r"`model.gguf_file` must be a file of .*, but got 'other.gguf'. .*: some.gguf"
    ):
        find_files(model_config(folder, gguf_file="other.gguf"))


@pytest.mark.parametrize("path", ["nobody/nothing", "nothing", "bad id!"])
def test_unreachable_hub_is_one_sentence_after_one_try(path, monkeypatch, model_config):
    hub = Hub(monkeypatch, error=ConnectionError("no network\nmore"))
    with pytest.raises(ConfigError, match=f"'{path}' is not \\(no network\\)"):
        find_source(model_config(path, revision="v1"))
    assert hub.asked == [(path, "v1")]


def test_gated_model_says_what_to_do(monkeypatch, model_config):
    error = GatedRepoError("403", response=Response(403, request=Request("GET", "https://hub")))
    Hub(monkeypatch, ["model.safetensors"], download_error=error)
    with pytest.raises(ConfigError, match=r"'owner/name' asks for consent to its terms. .* `hf auth login`"):
        find_source(model_config("owner/name"))


FILES = [
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "tokenizer.json",
    "vocab.txt",
    "chat_template.jinja",
    "own.py",
    "onnx/model.onnx",
    "original/model.safetensors",
    "tf_model.h5",
    "small.gguf",
    "large.gguf",
]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, ["model.safetensors"]),
        ({"allow_pickle": True}, ["model.safetensors"]),  # safetensors are preferred
        ({"gguf_file": "small.gguf"}, ["small.gguf"]),
        ({"trust_remote_code": True}, ["model.safetensors", "own.py"]),
        ({"factory": "own:build"}, []),
    ],
)
def test_only_what_is_read_is_downloaded(folder, monkeypatch, model_config, settings, weights):
    hub = Hub(monkeypatch, FILES, folder=folder)
    assert find_source(model_config("owner/name", **settings)) == folder
    shared = ["config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja"]
    assert hub.wanted == sorted([*shared, *weights])
    assert hub.asked == [("owner/name", None)]


def test_pickle_on_the_hub_is_refused_before_it_is_downloaded(folder, monkeypatch, model_config):
    hub = Hub(monkeypatch, ["config.json", "pytorch_model.bin", "tokenizer.json"], folder=folder)
    with pytest.raises(ConfigError, match=r"`model.allow_pickle` must be true .* 'pytorch_model\.bin'"):
        find_source(model_config("owner/name"))
    assert hub.wanted is None
    find_source(model_config("owner/name", allow_pickle=True))
    assert "pytorch_model.bin" in hub.wanted


@pytest.fixture
def cached(folder, monkeypatch):
    """The folder as the hub's cache gives it, and a hub that must not be asked."""
    hub = Hub(monkeypatch, error=ConnectionError("asked"))
    monkeypatch.setattr(folder_file, "try_to_load_from_cache", lambda path, name, *, revision: str(folder / name))
    return hub


def test_model_in_the_cache_is_found_without_asking(folder, cached, model_config):
    assert find_source(model_config("owner/name", revision="v1")) == folder
    assert cached.asked == []


@pytest.mark.parametrize("lacking", ["model.safetensors", "tokenizer"])
def test_half_a_model_in_the_cache_is_asked_for(folder, cached, model_config, lacking):
    for file in folder.glob(f"{lacking}*"):
        file.unlink()
    with pytest.raises(ConfigError, match="asked"):
        find_source(model_config("owner/name"))


def test_every_shard_must_be_in_the_cache(folder, cached, model_config):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ConfigError, match="asked"):
        find_source(model_config("owner/name"))
    (folder / "model-00002-of-00002.safetensors").touch()
    assert find_source(model_config("owner/name")) == folder


def test_tokenizer_alone_is_enough_beside_a_factory(folder, cached, model_config):
    (folder / "model.safetensors").unlink()
    assert find_source(model_config("owner/name", factory="own:build")) == folder
