"""Reads the packaged texts of Python's standard library, which are the same on every machine.

They are those of Python 3.11.7 (`benchmarks/write_stdlib.py`): `stdlib_code` has modules on which the embedded model
was not pre-trained, and `stdlib_docs` has pages of the documentation and docstrings.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

from lorasweep.data.source import DataSource, Examples, collect_examples
from lorasweep.tasks.text.read import Document

TEXTS = Path(__file__).parent / "texts"


@functools.cache
def read_stdlib(name: str) -> DataSource:
    """Returns the documents of `stdlib_docs` or `stdlib_code`."""
    with gzip.open(TEXTS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def read(split: str) -> Examples[Document]:
        return collect_examples(split, [Document(row["name"], row["text"]) for row in rows if row["split"] == split])

    return DataSource(train=read("train"), validation=read("validation"), test=functools.cache(lambda: read("test")))
