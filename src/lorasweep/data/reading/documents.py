"""Whole texts, from plain files or a column of a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lorasweep.config.data import TextConfig
from lorasweep.data.reading.files import find_files, read_text
from lorasweep.data.reading.splitting import Checked, build_source, content_key
from lorasweep.data.reading.tables import choose_columns, open_tables, parse_rows, require_text
from lorasweep.data.source import DataSource, Document
from lorasweep.errors import ConfigError

MIN_DOCUMENTS = 20
"""With fewer documents than this, missing splits are the ends of all documents and not whole documents."""
SHARE_PERCENT = 10
"""Share of each document that a missing split gets where documents are cut."""


def read_texts(config: TextConfig) -> DataSource:
    """Returns text files, or the texts in a column of a hub data set, as documents.

    Raises:
        ConfigError: There is no such file or column, or it has no text.
    """
    read = _read_column(config) if config.path is not None else _read_files(config)
    train = read("train")
    return build_source(
        train,
        read,
        kind="documents",
        given=config.given,
        describe=lambda train, validation: [_describe("train", train), _describe("validation", validation)],
        split_off=_cut_tails if len(train.items) < MIN_DOCUMENTS else None,
    )


def _read_column(config: TextConfig) -> Callable[[str], Checked[Document]]:
    load = open_tables(config)

    def read(split: str) -> Checked[Document]:
        table = load(split, lambda names, place: choose_columns([("text", config.text)], names, place))
        texts, notes = parse_rows(table, require_text)
        return _check([Document(f"text {number}", text) for number, text in enumerate(texts, start=1)], *notes)

    return read


def _read_files(config: TextConfig) -> Callable[[str], Checked[Document]]:
    files = {split: find_texts(name, key=f"data.{split}") for split, name in config.given.items()}

    def read(split: str) -> Checked[Document]:
        paths, folder = files[split]
        texts = {path.absolute().relative_to(folder.absolute()).as_posix(): read_text(path) for path in paths}
        documents = [Document(name, text.replace("\r\n", "\n")) for name, text in texts.items() if text.strip()]
        if not documents:
            raise ConfigError(f"`data.{split}` must name files with text, but {str(paths[0])!r} is empty.")
        blank = len(texts) - len(documents)
        return _check(documents, *([f"{blank} files of {split} without text are left out."] if blank else []))

    return read


def find_texts(given: str, *, key: str) -> tuple[list[Path], Path]:
    """Returns the files that a setting names, and the folder that their names are relative to.

    A folder means all files below it, except where a name begins with a dot.

    Raises:
        ConfigError: There is none.
    """
    found = find_files(given, key=key)
    if not found[0].is_dir():
        return found, Path(os.path.commonpath([file.parent.absolute() for file in found]))
    folder = found[0]
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [folder / name for name in names if not any(piece.startswith(".") for piece in name.parts)]
    if not files:
        raise ConfigError(f"`{key}` must name a folder with files, but {given!r} has none.")
    return files, folder


def _check(documents: list[Document], *notes: str) -> Checked[Document]:
    return Checked(items=documents, keys=[content_key([document.text]) for document in documents], notes=notes)


def _cut_tails(train: Checked[Document], missing: Sequence[str]) -> dict[str, Checked[Document]]:
    """Cuts the missing splits off the end of every document."""
    start = 100 - SHARE_PERCENT * len(missing)
    spans = {"train": (0, start)}
    spans |= {split: (start + n * SHARE_PERCENT, start + (n + 1) * SHARE_PERCENT) for n, split in enumerate(missing)}
    splits = {}
    for split, (low, high) in spans.items():
        pieces = [piece for document in train.items if (piece := cut(document, low=low, high=high)).text.strip()]
        if not pieces:
            raise ConfigError(
                f"`data.train` must be long enough to take {' and '.join(missing)} from the end of its documents, but "
                f"then nothing is left for {split}. Give more text, or the splits as files of their own."
            )
        splits[split] = _check(pieces)
    notes = [
        f"{split} is split off from train: the text between {spans[split][0]} % and {spans[split][1]} % of each of its "
        f"{len(train.items)} documents, cut where a line ends."
        for split in missing
    ]
    return {**splits, "train": _check(splits["train"].items, *train.notes, *notes)}


def cut(document: Document, *, low: int, high: int) -> Document:
    """Returns a stretch of a document, in hundredths of its characters; it begins and ends where a line does.

    Where no line ends in the hundredth that follows, it ends after a space, or else right there.
    """
    first, last = (_find_cut(document.text, percent) for percent in (low, high))
    return Document(document.name, document.text[first:last])


def _find_cut(text: str, percent: int) -> int:
    at = len(text) * percent // 100
    if percent in (0, 100):
        return at
    for end in ("\n", " "):
        found = text.find(end, at, at + len(text) // 100 + 1)
        if found >= 0:
            return found + 1
    return at


def _describe(name: str, split: Checked[Document]) -> str:
    size = sum(len(document.text.encode()) for document in split.items)
    return f"{name} has {size:,} bytes in {len(split.items)} documents."
