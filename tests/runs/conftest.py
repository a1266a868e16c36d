"""A finished run of a few steps."""

import shutil
from pathlib import Path

import pytest

from lorasweep.training.open_run import RunFolder
from lorasweep.training.run import train_alone


@pytest.fixture(scope="session")
def finished(make_config, inputs, tmp_path_factory):
    """A LoRA run of rank 2 with dropout, of 4 steps and 2 evaluations."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_alone(make_config({"method.dropout": 0.1}), RunFolder(path=folder), inputs=inputs)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
