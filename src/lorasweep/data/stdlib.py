"""Text that every Python installation has: the source of its standard library and its language documentation.

Documents come out whole and already assigned to a split; `splits` turns them into tokens.
The split is fixed by names alone, so it does not move when a file changes or a module is added.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lorasweep.data.source import Document

EXCLUDED_FOLDERS = frozenset({"encodings", "pydoc_data", "site-packages", "__pycache__"})


def assign_bucket(key: str) -> int:
    """Returns the bucket (0 to 99) of a document's key: its SHA-256, first 8 hex digits, modulo 100."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100


def code_key(path: str) -> str:
    """Returns the key under which a module, its private twin and its tests are split together.

    `json/decoder.py`, `test/test_json/test_dump.py` and `_json.py` all belong to `json`, so that a model pre-trained
    on the tests of a module has never seen code that goes with a held-out one.
    """
    parts = path.removesuffix(".py").split("/")
    name = parts[1] if parts[0] == "test" and len(parts) > 1 else parts[0]
    return name.removeprefix("test_").lstrip("_").removeprefix("py")


def read_standard_library(*, with_tests: bool) -> Iterator[Document]:
    """Yields the standard library's modules in order of their paths.

    Args:
        with_tests: Whether the test suite (`test/`, `*/tests/`) is included. Some distributions do not ship it.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder).as_posix()
        parts = path.split("/")
        if EXCLUDED_FOLDERS.intersection(parts):
            continue
        if not with_tests and ({"test", "tests", "idle_test"} & set(parts)):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files test other encodings
        if text:
            yield Document(name=path, text=text)


def read_code(split: str) -> list[Document]:
    """Returns the modules of one split of the standard library's code.

    The bucket of a module's `code_key` decides its split: 0 to 69 is `pretraining`, 70 to 89 `train`, 90 to 94
    `validation`, 95 to 99 `test`. Only `pretraining` includes test suites.
    """
    low, high = {"pretraining": (0, 70), "train": (70, 90), "validation": (90, 95), "test": (95, 100)}[split]
    documents = read_standard_library(with_tests=split == "pretraining")
    return [document for document in documents if low <= assign_bucket(code_key(document.name)) < high]


def read_docs(split: str) -> list[Document]:
    """Returns the topics of one split of `pydoc_data.topics`.

    The bucket of a topic's name decides its split: 0 to 69 is `train`, 70 to 84 `validation`, 85 to 99 `test`.
    """
    low, high = {"train": (0, 70), "validation": (70, 85), "test": (85, 100)}[split]
    topics = sorted(pydoc_data.topics.topics.items())
    return [Document(name=name, text=text) for name, text in topics if low <= assign_bucket(name) < high]
