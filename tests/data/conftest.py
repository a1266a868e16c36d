"""Data sets of a few examples, written to a folder and read back."""

import json
from pathlib import Path

import pytest
import torch

from lorasweep.config.compose import compose_run
from lorasweep.data.rows import Ragged
from lorasweep.tasks.task import read_source

SPLITS = ("train", "validation", "test")


def make_data(name, **settings):
    """Settings of data: those of `conf/data/`, and these."""
    return compose_run({"data": name, **{f"data.{key}": value for key, value in settings.items()}}).data


def make_ragged(sequences):
    """Sequences of different lengths from lists."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    values = torch.tensor([value for sequence in sequences for value in sequence], dtype=torch.int64)
    return Ragged.join(values, lengths=lengths)


def jsonl_of(*rows):
    return "\n".join(map(json.dumps, rows))


def said(role, content):
    """Returns a message of a chat."""
    return {"role": role, "content": content}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, so that messages name files as a user would."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder):
    """Writes a file and returns its path, relative to the current folder."""

    def write_file(name, content):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path.relative_to(folder)

    return write_file


@pytest.fixture
def read(write):
    """Writes files and reads them: `read("table", {"train.csv": "..."}, train="train.csv")`."""

    def write_and_read(name, files, /, **settings):
        for file, content in files.items():
            write(file, content)
        splits = {Path(file).stem: file for file in files if Path(file).stem in SPLITS}
        return read_source(make_data(name, **(splits | settings)))

    return write_and_read
