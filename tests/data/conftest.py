"""Data sets of a few examples, written to a folder and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasweep.config.compose import compose_run
from lorasweep.config.data import DataConfig
from lorasweep.data.reading import read_source
from lorasweep.data.source import DataSource

SPLITS = ("train", "validation", "test")


def make_data(name: str, **settings: Any) -> DataConfig:
    """Settings of data: those of `conf/data/`, and these."""
    return compose_run({"data": name, **{f"data.{key}": value for key, value in settings.items()}}).data


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that messages name files as a user would."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file and returns its path, relative to the current folder."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path.relative_to(folder)

    return write_file


@pytest.fixture
def read(write: Callable[[str, str | bytes], Path]) -> Callable[..., DataSource]:
    """Writes files and reads them: `read("table", {"train.csv": "..."}, train="train.csv")`."""

    def write_and_read(name: str, files: dict[str, str | bytes], /, **settings: Any) -> DataSource:
        for file, content in files.items():
            write(file, content)
        splits = {Path(file).stem: file for file in files if Path(file).stem in SPLITS}
        return read_source(make_data(name, **(splits | settings)))

    return write_and_read
