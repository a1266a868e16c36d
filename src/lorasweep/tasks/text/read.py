"""Reads whole texts from plain files or from a column of a hub data set."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lorasweep.data.reading.files import find_texts, open_text
from lorasweep.data.reading.tables import choose_columns, open_tables, parse_rows, require_text
from lorasweep.data.source import DataSource, ReadExamples, build_source, content_key
from lorasweep.errors import ConfigError
from lorasweep.tasks.text.settings import TextConfig

MIN_DOCUMENTS = 20
"""With fewer documents, a missing split is cut off the end of every document instead of taking whole documents."""


class Document(NamedTuple):
    """A whole text, which is later cut into blocks, and its name."""

    name: str
    text: str
    group: str | None = None
    """Value of the column `data.group`; None if each document is a group."""

    def list_texts(self) -> Iterator[str]:
        yield from (self.name, self.text)


def read_texts(config: TextConfig) -> DataSource:
    """Returns text files, or the texts in a column of a hub data set. Raises ConfigError if there is no text."""
    if config.path is None:
        files = {split: find_texts(name, key=f"data.{split}") for split, name in config.sources.items()}
    else:
        tables = open_tables(config, functools.partial(choose_columns, [("text", config.text)]))

    def read(split: str) -> ReadExamples[Document]:
        if config.path is None:
            return _read_files(*files[split], split=split)
        rows, notes = parse_rows(tables.pop(split), lambda text, group: (require_text(text), group))
        return [Document(f"text {number}", *row) for number, row in enumerate(rows, start=1)], notes

    train = read("train")
    return build_source(
        train,
        read,
        missing=config.choose_split_percents(),
        key=lambda document: content_key([document.text]),
        describe=lambda train, validation: [
            f"{name} has {sum(len(document.text.encode()) for document in documents):,} bytes in {len(documents)} "
            "documents."
            for name, documents in (("train", train), ("validation", validation))
        ],
        split_off=_cut_ends if len(train[0]) < MIN_DOCUMENTS else None,
    )


def _read_files(paths: list[Path], folder: Path, *, split: str) -> ReadExamples[Document]:
    texts: dict[str, str] = {}
    for path in paths:
        with open_text(path) as file:
            texts[path.absolute().relative_to(folder.absolute()).as_posix()] = file.read()
    documents = [Document(name, text) for name, text in texts.items() if text.strip()]
    if not documents:
        raise ConfigError(f"`data.{split}` must name files with text, but {str(paths[0])!r} is empty.")
    num_blank = len(texts) - len(documents)
    return documents, [f"{num_blank} files of {split} without text are skipped."] if num_blank else []


def _cut_ends(documents: list[Document], missing: Mapping[str, int]) -> tuple[dict[str, list[Document]], list[str]]:
    """Cuts the missing splits off the end of every document."""
    parts: dict[str, list[Document]] = {}
    notes, end = [], 0
    for split, percent in {"train": 100 - sum(missing.values()), **missing}.items():
        start, end = end, end + percent
        cuts = [cut_document(document, low=start, high=end) for document in documents]
        parts[split] = [document for document in cuts if document.text.strip()]
        if not parts[split]:
            raise ConfigError(
                f"`data.train` must be long enough to take {' and '.join(missing)} from the end of its documents, but "
                f"then nothing is left for {split}. Give more text, or give each split its own file."
            )
        if split in missing:
            notes.append(
                f"{split} is split off from train: the text between {start} % and {end} % of each of its "
                f"{len(documents)} documents, cut where a line ends."
            )
    return parts, notes


def cut_document(document: Document, *, low: int, high: int) -> Document:
    """Returns the part of a document between two percentages of its characters.

    Each end is moved to the next end of a line, or to the next space if no line ends within 1 % of the text.
    """

    def find_cut(percent: int) -> int:
        text, index = document.text, len(document.text) * percent // 100
        if percent in (0, 100):
            return index
        ends = (text.find(end, index, index + len(text) // 100 + 1) for end in ("\n", " "))
        return next((found + 1 for found in ends if found >= 0), index)

    return document._replace(text=document.text[find_cut(low) : find_cut(high)])
