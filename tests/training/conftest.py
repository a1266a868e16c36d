"""Runs on a small random Llama, which trains faster than the embedded model."""

import pytest
from tests.training.runs import train

from lorasweep.training.inputs import load_inputs


@pytest.fixture(scope="session")
def make_config(make_config, quantisable_model):
    def make(settings=None, /):
        given = settings or {}
        small = {} if "model" in given else {"model": "causal_lm", "model.path": str(quantisable_model)}
        return make_config({**small, **given})

    return make


@pytest.fixture(scope="session")
def inputs(make_config):
    return load_inputs(make_config())


@pytest.fixture(scope="session")
def finished(make_config, inputs, tmp_path_factory):
    """The folder of a LoRA run of 4 steps and two evaluations that nothing disturbed. No test may change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, make_config(), inputs=inputs)
    return folder
