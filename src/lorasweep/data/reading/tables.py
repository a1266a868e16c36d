"""Tables of texts and labels, from files or from a data set of the hub. `labelled` and `conversations` check them.

Files are not read by `datasets.load_dataset`, because it guesses types: the text `NA` would get lost, the label `01`
become 1, a text that looks like a date become a date, and a column of texts and numbers be refused.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow
import pyarrow.parquet

from lorasweep.config.data import SplitSettings
from lorasweep.data.reading.files import find_files, read_text
from lorasweep.data.reading.hub import class_names_of, load_hub, select_columns
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import nearest, shorten

T = TypeVar("T")

csv.field_size_limit(sys.maxsize)  # Python's default of 131,072 characters is less than some texts have

ColumnChoice = Callable[[Sequence[str], str], Sequence[str]]
"""Takes the columns of a file and its name, returns those to read; raises ConfigError where one is missing."""
Columns = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Some columns of one or several files, or of a split of a hub data set."""

    columns: Columns
    sources: Sequence[tuple[int, str]]
    """First row and name of each file."""
    may_drop: bool = False
    """Whether unusable rows are left out and counted (users can't correct a hub data set); else they are errors."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in their own order, where the data set states them."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(next(iter(self.columns.values())))

    def place(self, row: int) -> str:
        """Returns where a row came from: `row 12 of 'reviews.csv'`, counted from 1 below a header."""
        first, name = [source for source in self.sources if source[0] <= row][-1]
        return f"row {row - first + 1} of {name!r}"


LoadTable = Callable[[str, ColumnChoice], Table]
"""Takes the name of a split and the choice of its columns, returns its table."""


def open_tables(config: SplitSettings) -> LoadTable:
    """Returns a function that reads the table of a split; whether files and splits exist is checked at once.

    Raises:
        ConfigError: A file, data set or split does not exist.
    """
    if config.path is None:
        files = {split: find_tables(name, key=f"data.{split}") for split, name in config.given.items()}
        return lambda split, choose: read_files(files[split], choose=choose)
    path, splits = config.path, load_hub(config)

    def load(split: str, choose: ColumnChoice) -> Table:
        dataset, name = splits[split], f"{path}, {config.given[split]}"
        chosen = list(choose(dataset.column_names, repr(name)))
        return Table(
            columns=select_columns(dataset, chosen),
            sources=[(0, name)],
            may_drop=True,
            class_names=class_names_of(dataset, chosen),
        )

    return load


def find_tables(given: str, *, key: str) -> list[Path]:
    """Returns the table files that a setting names, without reading them.

    Raises:
        ConfigError: There is none, or they are of an unknown kind or of several kinds.
    """
    files = find_files(given, key=key)
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) > 1 or kinds[0] not in READERS:
        raise ConfigError(
            f"`{key}` must name files of one kind, {', '.join(READERS)}, but got {given!r} "
            f"({', '.join(kinds) or 'a folder'}). Save them as one kind, or narrow the glob."
        )
    return files


def read_files(files: Sequence[Path], *, choose: ColumnChoice) -> Table:
    """Returns the chosen columns of files of one kind, one file after the other.

    Raises:
        ConfigError: A file is broken or empty, or a column is missing.
    """
    columns: Columns = {}
    sources = []
    for file in files:
        try:
            found = READERS[file.suffix.lower()](file, choose)
        except (OSError, UnicodeError, csv.Error, json.JSONDecodeError, pyarrow.ArrowException) as error:
            raise ConfigError(
                f"{str(file)!r} must be a {file.suffix[1:]} file, but can't be read: {first_line(error)}."
            ) from error
        sources.append((len(next(iter(columns.values()), ())), str(file)))
        for name in columns or found:
            if name not in found:
                raise ConfigError(f"{str(file)!r} must have the column {name!r} of {str(files[0])!r}, but has not.")
            columns.setdefault(name, []).extend(found[name])
    return Table(columns=columns, sources=sources)


def _read_csv(path: Path, choose: ColumnChoice) -> Columns:
    """Reads commas and quotes as in RFC 4180; every value is a text."""
    return _read_delimited(path, choose, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path, choose: ColumnChoice) -> Columns:
    """Reads IANA's text/tab-separated-values: a line is a row, a tab ends a field, quotes are ordinary characters."""
    return _read_delimited(path, choose, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_delimited(path: Path, choose: ColumnChoice, *, delimiter: str, quoting: Literal[0, 3]) -> Columns:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        rows = []
        for row in reader:
            if None in row or None in row.values():  # how DictReader tells of a row with too many or too few fields
                raise ConfigError(
                    f"line {reader.line_num} of {str(path)!r} must have {len(reader.fieldnames)} columns, like its "
                    "header, but has more or fewer. Put quotes around a text with commas in a csv."
                )
            rows.append(row)
    return _choose_keys(path, rows, choose)


def _read_json(path: Path, choose: ColumnChoice) -> Columns:
    """Reads an object per line, or one array of objects."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return _choose_keys(path, json.loads(text), choose)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines, which also splits at U+2028 in a text
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ConfigError(f"line {number} of {str(path)!r} must be JSON, but has this: {error}.") from error
    return _choose_keys(path, rows, choose)


def _read_parquet(path: Path, choose: ColumnChoice) -> Columns:
    names = choose(pyarrow.parquet.read_schema(path).names, repr(str(path)))
    columns: Columns = pyarrow.parquet.read_table(path, columns=list(names)).to_pydict()
    return columns


READERS: Mapping[str, Callable[[Path, ColumnChoice], Columns]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""The function that reads a file, by the suffix of its name."""


def _choose_keys(path: Path, rows: Sequence[Mapping[str, Any]], choose: ColumnChoice) -> Columns:
    """Returns columns of rows; the keys of the first row are the columns to choose from."""
    if not rows:
        raise ConfigError(f"{str(path)!r} must have rows, but has none.")
    if not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(f'{str(path)!r} must have JSON objects, {{"text": "...", "label": "..."}}, but has others.')
    return {name: [row.get(name) for row in rows] for name in choose(list(rows[0]), repr(str(path)))}


def parse_rows(table: Table, parse: Callable[..., T]) -> tuple[list[T], tuple[str, ...]]:
    """Returns each row parsed by `parse`, and a note with the number of unusable rows, if some were left out.

    Args:
        table: Its columns are the arguments of `parse`.
        parse: Raises ValueError for an unusable row, with the message "must have X, but has Y".

    Raises:
        ConfigError: A row of a file can't be used, or no row of a hub data set can.
    """
    parsed: list[T] = []
    problems: list[str] = []
    for row, values in enumerate(zip(*table.columns.values(), strict=True)):
        try:
            parsed.append(parse(*values))
        except ValueError as error:
            problems.append(f"{table.place(row)} {error}")
    if not problems:
        return parsed, ()
    if not table.may_drop:
        raise ConfigError(f"{problems[0]}. Mend the row or remove it. {len(problems)} rows have a problem.")
    name, first = table.sources[0][1], f"The first problem: {problems[0]}."
    if not parsed:
        raise ConfigError(f"{name!r} must have usable rows, but has none. {first}")
    return parsed, (f"{len(problems)} of {len(table)} rows of {name!r} are left out. {first}",)


def require_text(value: Any) -> str:
    """Returns a value that is a text and not blank.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must have a text, but has {shorten(value)}")
    return value


def choose_columns(wanted: Iterable[tuple[str, str | None]], names: Sequence[str], place: str) -> list[str]:
    """Returns the names of the columns that are wanted.

    Args:
        wanted: Settings and the column that each names; null settings are left out.
        names: The columns of the file.
        place: Name of the file, for error messages.

    Raises:
        ConfigError: One of them is not there; the message names the nearest one.
    """
    chosen = [(key, name) for key, name in wanted if name is not None]
    for key, name in chosen:
        if name not in names:
            raise ConfigError(
                f"`data.{key}` must be a column of {place}, but got {name!r}.{nearest(name, names)} "
                f"Its columns are {shorten(list(names), 400)}."
            )
    return [name for _, name in chosen]
