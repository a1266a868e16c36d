"""Finished runs of a few steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasweep.training.inputs import RunInputs
from lorasweep.training.run import train_run
from lorasweep.training.run_log import RunFolder


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory, make_config: Any, inputs: RunInputs) -> dict[str, Path]:
    """Folders of finished runs of a few steps: `lora`, `other` (another seed and rank), `full`, `frozen`."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, dict[str, Any]] = {
        "lora": {},
        "other": {"seed": 1, "method.rank": 4},
        "full": {"method": "full", "optim.lr": 1e-3},
        "frozen": {"method": "frozen"},
    }
    for name, changed in settings.items():
        train_run(make_config(changed), RunFolder(path=folder / name), inputs=inputs)
    return {name: folder / name for name in settings}


@pytest.fixture
def runs(trained_runs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of those folders, to be written to."""
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in trained_runs.items()}


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Reads a JSON file, lets `change` change it, writes it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
