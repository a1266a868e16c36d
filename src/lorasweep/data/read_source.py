"""Where examples come from: `read_source` gives them for any `data=...`. Next: `splits` makes tokens of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from lorasweep.config.data import (
    ChatConfig,
    CustomDataConfig,
    DataConfig,
    GlueConfig,
    StdlibConfig,
    TextConfig,
    glue_as_table,
)
from lorasweep.data.own import read_own
from lorasweep.data.reading.conversations import read_conversations
from lorasweep.data.reading.documents import read_texts
from lorasweep.data.reading.labelled import read_labelled
from lorasweep.data.reading.tables import open_tables
from lorasweep.data.source import DataSource, Document, Examples, collect_examples
from lorasweep.data.stdlib import read_code, read_docs

DocumentReader = Callable[[str], list[Document]]
"""Takes the name of a split, returns its documents, always the same and in the same order."""

STDLIB_READERS: Mapping[str, DocumentReader] = {"stdlib_docs": read_docs, "stdlib_code": read_code}


def read_source(config: DataConfig) -> DataSource:
    """Returns the examples of a data set: checked, by split, with sentences about them.

    The test split is read at the first call of `test`; that its file exists is checked at once.

    Raises:
        ConfigError: A file, column, row or label can't be used; the message names the place. For the test split,
            when it is called for.
    """
    if isinstance(config, StdlibConfig):
        return _read_stdlib(config)
    if isinstance(config, TextConfig):
        return read_texts(config)
    if isinstance(config, CustomDataConfig):
        return read_own(config)
    if isinstance(config, ChatConfig):
        return read_conversations(config, open_tables(config))
    table = glue_as_table(config) if isinstance(config, GlueConfig) else config
    return read_labelled(table, open_tables(table))


def _read_stdlib(config: StdlibConfig) -> DataSource:
    def read(split: str) -> Examples[Document]:
        return collect_examples(split, STDLIB_READERS[config.name](split))

    return DataSource(
        kind="documents",
        train=read("train"),
        validation=read("validation"),
        test=functools.cache(lambda: read("test")),
    )
