"""Columns of one or several files, with the line that each row came from. Comes after `formats`; next: the forms."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorasweep.data.reading.files import find_files
from lorasweep.data.reading.formats import READERS, ColumnChoice
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Some columns of one or several files."""

    columns: Mapping[str, list[Any]]
    numbers: Sequence[int]
    """Line of each row in its file (where its first line begins), or number of the row."""
    sources: Sequence[tuple[int, str]]
    """First row and name of each file."""
    unit: str
    """What `numbers` count: `line` or `row`."""
    may_drop: bool = False
    """Whether rows that can't be used are left out and counted (a hub's, which nobody here can mend) or are errors."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in their own order, where the data set states them."""
    notes: tuple[str, ...] = ()
    """Sentences on what was left out."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.numbers)

    def place(self, row: int) -> str:
        """Returns where a row came from: `line 12 of 'reviews.csv'`."""
        source = [name for first, name in self.sources if first <= row][-1]
        return f"{self.unit} {self.numbers[row]} of {source!r}"

    def take(self, rows: Sequence[int], *, note: str) -> Table:
        """Returns some rows of a table that is one file's, with a sentence on why these."""
        assert len(self.sources) == 1
        return replace(
            self,
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            numbers=[self.numbers[row] for row in rows],
            notes=(*self.notes, note),
        )


def read_table(files: Sequence[Path], *, choose: ColumnChoice) -> Table:
    """Returns the wanted columns of files of one kind, one after the other.

    Raises:
        ConfigError: A file is of an unknown kind, broken or empty, or a column is missing.
    """
    columns: dict[str, list[Any]] = {}
    numbers = array("Q")
    sources = []
    for file in files:
        sources.append((len(numbers), str(file)))
        read = READERS[file.suffix.lower()](file, choose)
        if columns and list(columns) != read.names:
            raise ConfigError(
                f"all files must have the same columns, but {str(file)!r} has {', '.join(read.names)} "
                f"where {sources[0][1]!r} has {', '.join(columns)}."
            )
        lists = [columns.setdefault(name, []) for name in read.names]
        for number, values in read.records:
            numbers.append(number)
            for column, value in zip(lists, values, strict=True):
                column.append(value)
        if len(numbers) == sources[-1][0]:
            raise ConfigError(f"{str(file)!r} must have rows, but has none below its header.")
    notes = _note_quotes(columns, name=sources[0][1]) if files[0].suffix.lower() == ".tsv" else ()
    return Table(columns=columns, numbers=numbers, sources=sources, unit=read.unit, notes=notes)


def _note_quotes(columns: Mapping[str, list[Any]], *, name: str) -> tuple[str, ...]:
    """Says so if texts of a tsv look as a csv writer would have left them."""
    looks = sum(
        value[:1] == '"' == value[-1:] and '""' in value[1:-1] for values in columns.values() for value in values
    )
    if not looks:
        return ()
    return (f"{looks} texts of {name!r} look quoted as in csv; in a tsv quotes are part of the text.",)


def find_tables(given: str, *, key: str) -> list[Path]:
    """Returns the files that a setting names; nothing of them is read.

    Raises:
        ConfigError: There is none, or they are of an unknown kind or of several.
    """
    files = find_files(given, key=key)
    kinds = {file.suffix.lower() for file in files}
    if files[0].is_dir():
        raise ConfigError(f"`{key}` must name a file or a glob such as '{given}/*.csv', but {given!r} is a folder.")
    if unknown := sorted(kinds - set(READERS)):
        raise ConfigError(
            f"`{key}` must name a file that ends in {', '.join(READERS)}, but got {given!r}"
            f"{f' with {unknown[0]}' if len(files) > 1 else ''}. Save it as one of these."
        )
    if len(kinds) > 1:
        raise ConfigError(f"`{key}` must name files of one kind, but {given!r} has {', '.join(sorted(kinds))}.")
    return files


def require_column(name: str, names: Sequence[str], *, key: str, place: str) -> str:
    """Returns the name of a column if it is one of those there are.

    Raises:
        ConfigError: It is not; the message names the nearest one.
    """
    if name not in names:
        shown = [given if len(given) <= 30 else f"{given[:30]}..." for given in names[:12]]
        raise ConfigError(
            f"`{key}` must be a column of {place}, but got {name!r}.{nearest(name, names)} Its columns are {shown!r}."
        )
    return name
