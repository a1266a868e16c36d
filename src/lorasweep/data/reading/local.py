"""Reads the chosen columns of a csv, tsv, txt, jsonl, json or parquet file, and says what is wrong in it."""

from __future__ import annotations

import csv
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pandas
import pyarrow
import pyarrow.parquet
from pandas.errors import EmptyDataError, ParserError, ParserWarning

from lorasweep.config.data import Delimiter, RowSettings
from lorasweep.data.reading.files import find_files, find_suffix, open_text, refuse_unreadable
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import shorten

ChooseColumns = Callable[[Sequence[str], str], Sequence[str]]
"""Takes the column names of a table and its name. Returns the columns to read. Raises ConfigError if one is missing."""
DELIMITERS: Mapping[Delimiter, str] = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
DEFAULT_DELIMITERS: Mapping[str, Delimiter] = {".csv": "comma", ".tsv": "tab", ".txt": "tab"}
"""The delimiter under `auto`, by suffix."""
TABLE_SUFFIXES = (*DEFAULT_DELIMITERS, ".jsonl", ".json", ".parquet")


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The chosen columns of a file, or of one split of a data set of the hub."""

    name: str
    columns: Mapping[str, Sequence[Any]]
    """The values of each column, of equal number."""
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes of a column whose values are their indices, in the order that the data set states."""

    def get_values(self, column: str) -> Sequence[Any]:
        """Returns the values of a column. A class index becomes a name, and a negative one (a hidden label) None."""
        values, names = self.columns[column], self.class_names.get(column)
        return [None if n is None or n < 0 else names[n] for n in values] if names else values


def find_tables(given: str, *, key: str) -> list[Path]:
    """Returns the table files that a setting names. Raises ConfigError if there are none or of several kinds."""
    files = find_files(given, key=key)
    kinds = {find_suffix(file) for file in files}
    if len(kinds) > 1 or not kinds <= set(TABLE_SUFFIXES):
        raise ConfigError(
            f"`{key}` must name files of one kind ({', '.join(TABLE_SUFFIXES)}), but got {given!r}. Save them as one "
            "kind, narrow the glob, or rename a file without a suffix (`.txt`: tabs between its fields)."
        )
    return files


def read_file(path: Path, config: RowSettings, choose: ChooseColumns) -> Table:
    """Returns the columns of a file that `choose` returns for the names of all.

    Values of csv, tsv and txt files stay texts: `NA` and `01` are not converted. A key that an object of a json file
    lacks is None.

    Raises ConfigError if the file is damaged or has no rows, and as `choose` does.
    """
    kind = find_suffix(path)

    def choose_checked(names: Sequence[str]) -> list[str]:
        try:
            return list(dict.fromkeys(choose(names, repr(str(path)))))
        except ConfigError as error:
            hint = " See also `data.columns` (for a file without a header) and `data.delimiter`."
            raise ConfigError(f"{error}{hint if kind in DEFAULT_DELIMITERS else ''}") from error

    read = _read_delimited if kind in DEFAULT_DELIMITERS else _read_parquet if kind == ".parquet" else _read_json
    with refuse_unreadable(path):
        table = read(path, config, choose_checked)
    if not any(table.columns.values()):
        raise ConfigError(f"{str(path)!r} must have rows, but has none.")
    return table


def _read_delimited(path: Path, config: RowSettings, choose: Callable[[Sequence[str]], list[str]]) -> Table:
    delimiter = _find_delimiter(path) if config.delimiter == "auto" else config.delimiter
    try:
        with warnings.catch_warnings(action="error", category=ParserWarning):  # rows with more fields than the header
            frame = pandas.read_csv(
                path,
                sep=DELIMITERS[delimiter],
                # between tabs a quote is a character: pandas would join rows silently at a text that begins with one
                quoting=csv.QUOTE_NONE if delimiter == "tab" else csv.QUOTE_MINIMAL,
                names=None if config.columns is None else list(config.columns),
                header=0 if config.columns is None else None,
                dtype=str,
                na_filter=False,  # otherwise the text NA, and fields that a short row lacks, would be no texts
                index_col=False,  # otherwise the first field would be lost if rows are longer than the header
                encoding="utf-8-sig",
            )
    except EmptyDataError:
        return Table(name=str(path), columns={})
    except (ParserError, ParserWarning) as error:
        hint = "Put quotes around a text that contains the delimiter, or set `data.delimiter`"
        raise ValueError(f"{first_line(error)}. {hint}") from error
    frame.columns = [str(name).strip() for name in frame.columns]
    return Table(name=str(path), columns={name: frame[name].tolist() for name in choose(list(frame.columns))})


def _find_delimiter(path: Path) -> Delimiter:
    """Returns the delimiter by suffix; the semicolon for a csv file whose first line has some and no comma."""
    delimiter = DEFAULT_DELIMITERS[find_suffix(path)]
    if delimiter == "comma":  # spreadsheets write semicolons where a comma is the decimal point
        with open_text(path) as file:
            first = file.readline()
        delimiter = "semicolon" if ";" in first and "," not in first else delimiter
    return delimiter


def _read_json(path: Path, config: RowSettings, choose: Callable[[Sequence[str]], list[str]]) -> Table:
    with open_text(path) as file:
        rows = list(_iterate_objects(path, file))
    names = list(dict.fromkeys(name for row in rows for name in row))
    chosen = choose(names) if names else []
    return Table(name=str(path), columns={name: [row.get(name) for row in rows] for name in chosen})


def _iterate_objects(path: Path, file: TextIO) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON list, or of a file with an object on every line."""
    first = file.readline()
    is_list = first.lstrip().startswith("[")
    for number, text in enumerate([first + file.read()] if is_list else itertools.chain([first], file), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
            for row in value if is_list else [value]:
                if not isinstance(row, dict):
                    raise ValueError(f"a row must be an object, but is {shorten(row)}")
                yield row
        except ValueError as error:
            place, problem = number, first_line(error)
            if isinstance(error, json.JSONDecodeError):
                place += error.lineno - 1
                # the message may be "Unterminated string starting at"
                problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            wanted = "must be a JSON list" if is_list else "must have JSON on every line"
            raise ConfigError(f"{str(path)!r} {wanted}, but line {place} is wrong: {problem}.") from error


def _read_parquet(path: Path, config: RowSettings, choose: Callable[[Sequence[str]], list[str]]) -> Table:
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        table = file.read(columns=choose(schema.names))
    columns = {name: table[name].to_pylist() for name in table.column_names}
    # `datasets` writes its own types beside those of arrow
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    class_names = {
        name: tuple(kind["names"])
        for name, kind in stated.items()
        if name in columns and isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and kind.get("names")
    }
    return Table(name=str(path), columns=columns, class_names=class_names)
