"""Whole texts, from plain files or a column of a table. Comes after `files` and `tables`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from lorasweep.config.data import TextConfig
from lorasweep.data.reading.assembly import SPLITS, Checked, Form, assemble, keep_usable
from lorasweep.data.reading.files import find_files, read_lines
from lorasweep.data.reading.labelled import Tables, find_text_problem
from lorasweep.data.reading.splitting import content_key
from lorasweep.data.reading.tables import require_column
from lorasweep.data.source import DataSource, Documents, fingerprint_documents
from lorasweep.data.stdlib import Document
from lorasweep.errors import ConfigError

FEW_DOCUMENTS = 20
"""Fewer documents than this are not split by document: the end of each is split off."""
TAILS: Mapping[int, Mapping[str, tuple[int, int]]] = {
    1: {"validation": (90, 100), "test": (90, 100)},
    2: {"validation": (80, 90), "test": (90, 100)},
}
"""Where a split's share of a document begins and ends, in hundredths, by the number of splits that are split off."""

Reader = Callable[[str], Checked[Document]]


def read_text_files(config: TextConfig) -> DataSource:
    """Returns plain text files as documents.

    Raises:
        ConfigError: There is no such file, or it is not text in UTF-8.
    """
    given = {"train": config.train, "validation": config.validation, "test": config.test}
    files = {split: find_texts(path, key=f"data.{split}") for split, path in given.items() if path is not None}
    return _assemble(lambda split: _read_files(*files[split]), given=set(files))


def read_text_column(column: str, tables: Tables) -> DataSource:
    """Returns each row of a column as a document.

    Raises:
        ConfigError: There is no such column, or no row has a text.
    """

    def read(split: str) -> Checked[Document]:
        table = tables.load(split, lambda names, place: [require_column(column, names, key="data.text", place=place)])
        usable = keep_usable(table, (find_text_problem(text, column=column) for text in table.columns[column]))
        documents = [Document(name=f"row {row + 1}", text=table.columns[column][row]) for row in usable.rows]
        return check(documents, *usable.notes)

    return _assemble(read, given=tables.given)


def find_texts(given: str, *, key: str) -> tuple[list[Path], Path]:
    """Returns the files that a setting names, and the folder that their names are relative to.

    Of a folder these are all files below it, but those whose name, or folder's name, begins with a dot.

    Raises:
        ConfigError: There is none.
    """
    found = find_files(given, key=key)
    if found[0].is_dir():
        folder = found[0]
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        files = [folder / name for name in names if not any(part.startswith(".") for part in name.parts)]
        if not files:
            raise ConfigError(f"`{key}` must name a folder with files, but {given!r} has none.")
        return files, folder
    return found, Path(os.path.commonpath([file.parent.absolute() for file in found]))


def _read_files(files: Sequence[Path], folder: Path) -> Checked[Document]:
    texts = [(file, "".join(read_lines(file)).replace("\r\n", "\n")) for file in files]
    documents = [
        Document(name=file.absolute().relative_to(folder.absolute()).as_posix(), text=text)
        for file, text in texts
        if text.strip()
    ]
    empty = [file for file, text in texts if not text.strip()]
    if not documents:
        raise ConfigError(f"{str(empty[0])!r} must have text, but is empty.")
    if not empty:
        return check(documents)
    return check(documents, f"{len(empty)} files without text are left out. The first: {empty[0]}.")


def check(documents: list[Document], *notes: str) -> Checked[Document]:
    """Returns documents with their content keys."""
    return Checked(rows=documents, keys=[content_key([document.text]) for document in documents], notes=notes)


def _assemble(read: Reader, *, given: Collection[str]) -> DataSource:
    train = read("train")
    off = [split for split in SPLITS[1:] if split not in given]
    pieces: Mapping[str, Checked[Document]] = {}
    if off and len(train.rows) < FEW_DOCUMENTS:
        pieces = _cut_tails(train, off)
    return assemble(
        Form(
            kind="documents",
            label_names=(),
            train=train,
            read=read,
            given=given,
            pieces=pieces,
            same="text",
            limits={},
            build=_build,
            describe=_describe,
        )
    )


def _cut_tails(train: Checked[Document], off: Sequence[str]) -> dict[str, Checked[Document]]:
    """Cuts the splits that are missing off the end of every document."""
    spans = {"train": (0, 100 - 10 * len(off)), **TAILS[len(off)]}
    pieces = {}
    for split in ("train", *off):
        low, high = spans[split]
        rows = [piece for document in train.rows if (piece := cut(document, low=low, high=high)).text.strip()]
        if not rows:
            raise ConfigError(
                f"`data.train` must be long enough to split {' and '.join(off)} off from the end of its documents, "
                f"but then nothing is left for {split}. Give more text, or the splits as files of their own."
            )
        notes = (*train.notes, *_describe_tails(train.rows, off)) if split == "train" else ()
        pieces[split] = check(rows, *notes)
    return pieces


def _describe_tails(documents: Sequence[Document], off: Sequence[str]) -> list[str]:
    return [
        f"{split} is split off from train: the text between {low} % and {high} % of each of its {len(documents)} "
        "documents, cut where a line ends."
        for split in off
        for low, high in [TAILS[len(off)][split]]
    ]


def cut(document: Document, *, low: int, high: int) -> Document:
    """Returns a stretch of a document, in hundredths of its characters; it begins and ends where a line does.

    Where no line ends in the hundredth that follows, it ends after a space, or else right there.
    """
    text = document.text
    first, last = (_find_cut(text, hundredth) for hundredth in (low, high))
    return Document(name=document.name, text=text[first:last])


def _find_cut(text: str, hundredth: int) -> int:
    if hundredth in (0, 100):
        return len(text) * hundredth // 100
    at = len(text) * hundredth // 100
    for end in ("\n", " "):
        found = text.find(end, at, at + len(text) // 100 + 1)
        if found >= 0:
            return found + 1
    return at


def _build(name: str, rows: list[Document], notes: tuple[str, ...]) -> Documents:
    return Documents(name=name, documents=rows, fingerprint=fingerprint_documents(rows), notes=notes)


def _describe(train: Checked[Document], validation: Checked[Document]) -> list[str]:
    size, held_out = (sum(len(document.text.encode()) for document in split.rows) for split in (train, validation))
    counts = len(train.rows), len(validation.rows)
    return [f"train has {size:,} bytes in {counts[0]} documents, validation {held_out:,} in {counts[1]}."]
