"""Reads the examples that `data=...` selects."""

from __future__ import annotations

import functools

from lorasweep.config.data import (
    ChatConfig,
    CustomDataConfig,
    DataConfig,
    StdlibConfig,
    TextConfig,
)
from lorasweep.data.custom_module import read_custom_module
from lorasweep.data.reading.conversations import read_conversations
from lorasweep.data.reading.documents import read_texts
from lorasweep.data.reading.labelled import read_labelled
from lorasweep.data.source import DataSource, Document, Examples, collect_examples
from lorasweep.data.stdlib import read_code, read_docs


def read_source(config: DataConfig) -> DataSource:
    """Returns the checked examples of a data set.

    The test split is read at the first call of `DataSource.test`, but its file and columns must exist now.

    Raises:
        ConfigError: A file, column, row or label is missing or unusable. Errors in rows of the test split are raised
            when it is read.
    """
    if isinstance(config, StdlibConfig):
        return _read_stdlib(config)
    if isinstance(config, TextConfig):
        return read_texts(config)
    if isinstance(config, CustomDataConfig):
        return read_custom_module(config)
    if isinstance(config, ChatConfig):
        return read_conversations(config)
    return read_labelled(config)


def _read_stdlib(config: StdlibConfig) -> DataSource:
    read_documents = {"stdlib_docs": read_docs, "stdlib_code": read_code}[config.name]

    def read(split: str) -> Examples[Document]:
        return collect_examples(split, list(read_documents(split)))

    return DataSource(
        kind="documents",
        train=read("train"),
        validation=read("validation"),
        test=functools.cache(lambda: read("test")),
    )
