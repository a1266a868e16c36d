"""A model's files are found in a folder or by the hub's client, and what can't be had is one sentence."""

import shutil

import pytest
from httpx2 import Request, Response
from huggingface_hub.errors import GatedRepoError

from lorasweep.errors import ConfigError
from lorasweep.models import load as folder_file
from lorasweep.models.load import find_local_path, find_model_folder


@pytest.fixture
def folder(save_random, tmp_path):
    return shutil.copytree(save_random("llama"), tmp_path / "model")


@pytest.fixture
def download(monkeypatch, folder):
    """Stands for the hub's client: keeps the arguments of each call, and gives one folder or an error."""
    calls = []

    def answer(error=None):
        def download(path, **settings):
            calls.append((path, settings))
            if error:
                raise error
            return str(folder)

        monkeypatch.setattr(folder_file, "snapshot_download", download)
        return calls

    return answer


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
def test_a_hub_that_gives_nothing_is_one_sentence(download, model_config, error, message):
    download(error)
    with pytest.raises(ConfigError, match=message):
        find_model_folder(model_config("owner/name"))


@pytest.mark.parametrize(
    ("settings", "weights"),
    [({}, {"*.safetensors"}), ({"trust_remote_code": True}, {"*.safetensors", "*.py"})],
)
def test_only_what_may_be_read_is_downloaded(folder, download, model_config, settings, weights):
    calls = download()
    assert find_model_folder(model_config("owner/name", revision="v1", **settings)) == folder
    ((path, asked),) = calls
    assert (path, asked["revision"]) == ("owner/name", "v1")
    assert set(asked["allow_patterns"]) == weights | set(folder_file.ALWAYS_DOWNLOADED)
