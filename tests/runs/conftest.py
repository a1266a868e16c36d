"""Finished runs of a few steps."""

import shutil

import pytest

from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory, make_config, inputs):
    """Folders of finished runs of a few steps: `lora`, `other` (another seed and rank), `full`, `frozen`."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "lora": {},
        "other": {"seed": 1, "method.rank": 4},
        "full": {"method": "full", "optim.lr": 1e-3},
        "frozen": {"method": "frozen"},
    }
    for name, changed in settings.items():
        train_run(make_config(changed), RunFolder(path=folder / name), inputs=inputs)
    return {name: folder / name for name in settings}


@pytest.fixture
def runs(trained_runs, tmp_path):
    """Copies of those folders, to be written to."""
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in trained_runs.items()}
