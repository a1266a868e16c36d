"""Where rows come from: `read_source` gives those of any `data`. Next: `parts` makes tokens of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from lorasweep.config.data import DataConfig, StdlibConfig
from lorasweep.data.rows import Documents, RowSource, fingerprint_documents
from lorasweep.data.stdlib import Document, read_code, read_docs
from lorasweep.errors import ConfigError

DocumentReader = Callable[[str], list[Document]]
"""From the name of a part (`train`, `validation`, `test`) to its documents, always the same and in the same order."""

SOURCES: Mapping[str, DocumentReader] = {"stdlib_docs": read_docs, "stdlib_code": read_code}


def read_source(config: DataConfig) -> RowSource:
    """Returns the rows of a data set.

    Raises:
        ConfigError: They can't be read.
    """
    if not isinstance(config, StdlibConfig):
        raise ConfigError(f"`data` must be stdlib_docs or stdlib_code, but got {config.name!r}, which can't be read.")

    def read(name: str) -> Documents:
        documents = SOURCES[config.name](name)
        return Documents(name=name, documents=documents, fingerprint=fingerprint_documents(documents))

    return RowSource(
        kind="documents",
        label_names=(),
        train=read("train"),
        validation=read("validation"),
        test=functools.cache(lambda: read("test")),
        notes=(),
    )
