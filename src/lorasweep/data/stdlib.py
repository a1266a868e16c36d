"""Texts that every Python installation has: the source code of its standard library, and its language documentation.

The name of a document alone decides its split. So a document stays in its split if files are added or changed.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lorasweep.data.source import Document

EXCLUDED_FOLDERS = frozenset({"encodings", "pydoc_data", "site-packages", "__pycache__"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


def assign_bucket(key: str) -> int:
    """Returns a number from 0 to 99: the first 8 hex digits of the key's SHA-256, modulo 100."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100


def get_module_key(path: str) -> str:
    """Returns the name of the module that a file belongs to.

    `json/decoder.py`, `_json.py` and `test/test_json/test_dump.py` all belong to `json`. All files of a module must be
    in one split. Otherwise a model would be pre-trained on the tests of a module that it is later evaluated on.
    """
    parts = path.removesuffix(".py").split("/")
    name = parts[1] if parts[0] == "test" and len(parts) > 1 else parts[0]
    return name.removeprefix("test_").lstrip("_").removeprefix("py")


def read_standard_library(*, with_tests: bool) -> Iterator[Document]:
    """Yields the files of the standard library, sorted by path. Some distributions of Python have no test suites."""
    folder = Path(sysconfig.get_path("stdlib"))
    excluded = EXCLUDED_FOLDERS if with_tests else EXCLUDED_FOLDERS | TEST_FOLDERS
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder).as_posix()
        if excluded.intersection(path.split("/")):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files are in other encodings to test Python's decoding
        if text:
            yield Document(name=path, text=text)


def read_code(split: str) -> list[Document]:
    """Returns the standard library's files of one split. Only `pretraining` includes test suites."""
    low, high = {"pretraining": (0, 70), "train": (70, 90), "validation": (90, 95), "test": (95, 100)}[split]
    documents = read_standard_library(with_tests=split == "pretraining")
    return [document for document in documents if low <= assign_bucket(get_module_key(document.name)) < high]


def read_docs(split: str) -> list[Document]:
    """Returns the pages of `pydoc_data.topics` (the language documentation) of one split."""
    low, high = {"train": (0, 70), "validation": (70, 85), "test": (85, 100)}[split]
    topics = sorted(pydoc_data.topics.topics.items())
    return [Document(name=name, text=text) for name, text in topics if low <= assign_bucket(name) < high]
