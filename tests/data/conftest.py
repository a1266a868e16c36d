"""Data sets of a few rows, written to a folder and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasweep.config.data import ChatConfig, DataConfig, GlueConfig, HubConfig, TableConfig, TextConfig
from lorasweep.data.read_source import read_source
from lorasweep.data.source import DataSource

KINDS = {"table": TableConfig, "chat": ChatConfig, "text": TextConfig, "hub": HubConfig, "glue": GlueConfig}
LIMITS: dict[str, Any] = {"max_train_examples": None, "max_validation_examples": None, "max_test_examples": None}
BLOCKS: dict[str, Any] = {
    "block_length": 8,
    "separate_documents": False,
    "max_validation_blocks": None,
    "max_test_blocks": None,
}
LABELS: dict[str, Any] = {"task": "auto", "label_smoothing": 0.0, "class_weights": "none"}
CHAT: dict[str, Any] = {
    "prompt": None,
    "completion": None,
    "messages": None,
    "template": "auto",
    "separator": "\n",
    "packing": True,
    "generate": False,
}
SPLITS: dict[str, Any] = {"train": "train", "validation": None, "test": None}
COLUMNS: dict[str, Any] = {"text": "text", "text_pair": None, "label": "label"}
HUB: dict[str, Any] = dict.fromkeys((*COLUMNS, "subset", "revision")) | {"path": "owner/toy", "kind": "table"}
SETTINGS: dict[str, dict[str, Any]] = {
    "table": SPLITS | LIMITS | LABELS | COLUMNS | {"max_length": 8, "metric": "auto"},
    "chat": SPLITS | LIMITS | CHAT | {"max_length": 8, "metric": "loss"},
    "text": SPLITS | BLOCKS | {"metric": "loss"},
    "glue": LIMITS | LABELS | {"task": "mrpc", "max_length": 8, "metric": "auto"},
    "hub": SPLITS | LIMITS | LABELS | CHAT | BLOCKS | HUB | {"max_length": 8, "metric": "auto"},
}


def make_data(name: str, **settings: Any) -> DataConfig:
    """Settings of data: what `conf/data/` has, but short rows."""
    return KINDS[name](name=name, **(SETTINGS[name] | settings))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that messages name files as a user would."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def read(folder: Path) -> Callable[..., DataSource]:
    """Writes files and reads them: `read("table", {"train.csv": "..."}, train="train.csv")`."""

    def write_and_read(name: str, files: dict[str, str | bytes], /, **settings: Any) -> DataSource:
        for file, content in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        splits = {Path(file).stem: file for file in files if Path(file).stem in SPLITS}
        return read_source(make_data(name, **(splits | settings)))

    return write_and_read
