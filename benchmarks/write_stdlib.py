"""Writes the texts of `data=stdlib_docs` and `data=stdlib_code` from the standard library of this Python.

    python benchmarks/write_stdlib.py --out src/lorasweep/tasks/text/texts

The packaged texts are those of Python 3.11.7. The name of a document alone decides its split.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gzip
import hashlib
import json
import os
import pydoc_data.topics
import shutil
import sysconfig
from contextlib import suppress
from pathlib import Path

from lorasweep.tasks.text.read import Document

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
EXCLUDED_FOLDERS = frozenset({"encodings", "pydoc_data", "site-packages", "__pycache__"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
NUM_PRETRAINING_BUCKETS = 70
"""Number of buckets, out of 100, whose modules the embedded model was pre-trained on."""
SPLIT_BUCKETS = {"train": range(40), "validation": range(40, 57), "test": range(57, 100)}
"""Buckets of a document's name that belong to each split. The test split is large, because each of its documents is one
group in the report's intervals: more documents make them narrower."""
MIN_DOCSTRING_CHARACTERS = 500
DOCUMENTED_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK_NODES = (ast.stmt, ast.excepthandler, ast.match_case)


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


@functools.cache
def list_standard_library(*, with_tests: bool) -> tuple[Path, ...]:
    """Returns the files of the standard library, sorted. Some distributions of Python have no test suites."""
    excluded = EXCLUDED_FOLDERS if with_tests else EXCLUDED_FOLDERS | TEST_FOLDERS
    found: list[Path] = []
    for folder, folders, files in os.walk(STANDARD_LIBRARY):
        folders[:] = set(folders) - excluded  # `os.walk` does not enter them: `site-packages` may have 50,000 files
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    return tuple(sorted(found))


def read_code(split: str) -> tuple[Document, ...]:
    """Returns the standard library's files of one split.

    The files of 70 % of the modules, with their test suites, are `pretraining`. The others are split by file.
    """
    is_pretraining = split == "pretraining"
    documents: list[Document] = []
    for file in list_standard_library(with_tests=is_pretraining):
        name = file.relative_to(STANDARD_LIBRARY).as_posix()
        if (assign_bucket(get_module_key(name)) < NUM_PRETRAINING_BUCKETS) != is_pretraining:
            continue
        if is_pretraining or _is_in_split(name, split):
            with suppress(UnicodeDecodeError):  # a few files are in other encodings to test Python's decoding
                documents.append(Document(name=name, text=file.read_text(encoding="utf-8")))
    return tuple(document for document in documents if document.text)


@functools.cache
def read_docs(split: str) -> tuple[Document, ...]:
    """Returns the English prose of one split: pages of the language documentation, and docstrings of `read_code`.

    The pages are those of `pydoc_data.topics`. The docstrings of a file are one document, in the order of the file.
    Files with little text in docstrings are left out.
    """
    pages = [Document(name=name, text=text) for name, text in sorted(pydoc_data.topics.topics.items())]
    docstrings = [document._replace(text=join_docstrings(document.text)) for document in read_code(split)]
    return (
        *(page for page in pages if _is_in_split(page.name, split)),
        *(document for document in docstrings if len(document.text) >= MIN_DOCSTRING_CHARACTERS),
    )


def join_docstrings(code: str) -> str:
    """Returns the docstrings of a module, its classes and its functions, in the order of the file."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # some files are templates
        return ""
    nodes: list[ast.AST] = [tree]
    for node in nodes:  # grows; unlike `ast.walk`, it skips expressions, which are most nodes and have no docstrings
        nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, BLOCK_NODES)]
    documented = [node for node in nodes if isinstance(node, DOCUMENTED_NODES)]
    documented.sort(key=lambda node: getattr(node, "lineno", 0))  # a module has no line
    return "\n\n".join(text for node in documented if (text := ast.get_docstring(node)))


def _is_in_split(name: str, split: str) -> bool:
    return assign_bucket(name) in SPLIT_BUCKETS[split]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    for name, read in (("stdlib_docs", read_docs), ("stdlib_code", read_code)):
        lines = [
            json.dumps({"split": split, "name": document.name, "text": document.text}, ensure_ascii=False)
            for split in SPLIT_BUCKETS
            for document in read(split)
        ]
        content = "".join(f"{line}\n" for line in lines).encode()
        (out / f"{name}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))  # the same bytes each time
    shutil.copyfile(STANDARD_LIBRARY / "LICENSE.txt", out / "LICENSE.txt")


if __name__ == "__main__":
    main()
