"""Where text comes from: `SOURCES` maps `data.name` to a reader of documents. Next: `parts` makes tokens of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorasweep.data.stdlib import Document, read_code, read_docs

DocumentReader = Callable[[str], list[Document]]
"""From the name of a part (`train`, `validation`, `test`) to its documents, always the same and in the same order."""

SOURCES: Mapping[str, DocumentReader] = {"stdlib_docs": read_docs, "stdlib_code": read_code}
