"""What tests of several packages share: the settings of a run of a few seconds, and its base model and data."""

import gc
import logging
import os
import sys

import pytest
import torch
from tests.seeds import shift_seeds
from tests.small_runs import SMALL_RUN
from tests.tiny_tokenizer import load_tokenizer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lorasweep.config.compose import compose_run
from lorasweep.training.inputs import load_inputs

pytest_plugins = ["tests.servers.slurm"]
shift_seeds(int(os.environ.get("LORASWEEP_TEST_SEED", "0")))  # before test files draw their constants

SHORT_RUN = SMALL_RUN | {"trainer.progress": False, "method.rank": 2, "optim.lr": 1e-2}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Lets one process of xdist run all tests that share a fixture of their file, and puts slow tests first.

    The end of the suite is then made of short tests, so that no process waits long for another one.
    """
    for item in items:
        if any(found[-1].scope == "module" for found in item._fixtureinfo.name2fixturedefs.values()):
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    if hasattr(config, "workerinput"):  # a process of xdist
        items.sort(key=lambda item: not any(map(item.get_closest_marker, ("slow", "docs"))))


@pytest.fixture(autouse=True)
def _without_heartbeat(monkeypatch):
    """A slow machine prints nothing more than a fast one."""
    monkeypatch.setattr("lorasweep.console.MAX_SILENCE_S", 1e6)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keeps token ids out of the user's cache, so that no test depends on an earlier run."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session", autouse=True)
def _freeze_modules():
    """Takes what the imports made out of the garbage collector's way, which each run's end calls: 0.7 s a call."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _restore_logging(monkeypatch):
    """Takes back what Hydra sets up: its handlers would write to the stream of this test, which pytest closes."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # the command line that Hydra saw
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def _flush_nothing():
    """Leaves files in the system's cache: no test cuts the power, and a flush of a journal takes 5 ms or more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def short_words():
    """A run of a few seconds as one types it."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in SHORT_RUN.items()]


@pytest.fixture(scope="session")
def make_config():
    """Makes the settings of a run of a few seconds; keys of LoRA are left out under other methods."""

    def make(settings=None, /):
        given = settings or {}
        is_lora = given.get("method", "lora") == "lora"
        short = {key: value for key, value in SHORT_RUN.items() if is_lora or not key.startswith("method.")}
        return compose_run({**short, **given})

    return make


@pytest.fixture(scope="session")
def quantisable_model(tmp_path_factory):
    """Folder of a small random Llama with a byte tokenizer. The widths of its layers are multiples of 64, as nf4 needs;
    those of the embedded model are not."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, vocab_size=257, num_attention_heads=2, num_key_value_heads=1, eos_token_id=256)
    folder = tmp_path_factory.mktemp("quantisable")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inputs(make_config):
    """Base model and data of such a run, in fp32."""
    return load_inputs(make_config())


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Returns the folder of a small random encoder, in place of the model of 22 M parameters that the pages name."""
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(**sizes, vocab_size=257)).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return str(folder)
