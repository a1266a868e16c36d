"""Readers of csv, tsv, jsonl, json and parquet files, one row after the other. Comes after `files`; next: `tables`.

Not `datasets`: its csv reader guesses types (a text `NA` or `null` gets lost, a label `01` becomes 1), and its errors
name no line.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from lorasweep.data.reading.files import MAX_LINE_BYTES, read_lines
from lorasweep.errors import ConfigError, first_line

ColumnChoice = Callable[[Sequence[str], str], Sequence[str]]
"""From the columns that a file has, and its name, to those that are wanted; raises ConfigError where one is missing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """The rows of one file."""

    names: list[str]
    """The wanted columns."""
    unit: str
    """What rows are numbered by: `line` or `row`."""
    records: Iterable[tuple[int, Sequence[Any]]]
    """Number of each row and its values of the wanted columns; can be gone through once."""


def _read_delimited(path: Path, choose: ColumnChoice, *, delimiter: str, quoting: Literal[0, 3]) -> Records:
    rows = _parse_delimited(path, delimiter=delimiter, quoting=quoting)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    if not header:
        raise ConfigError(f"{str(path)!r} must have a first line with the names of its columns, but is empty.")
    _require_different(header, path=path)
    names = list(choose(header, repr(str(path))))
    indices = [header.index(name) for name in names]

    def read() -> Iterator[tuple[int, Sequence[Any]]]:
        for number, row in rows:
            if len(row) != len(header):
                raise ConfigError(_wrong_width(path, number, row, header, quoting=quoting))
            yield number, [row[index] for index in indices]

    return Records(names=names, unit="line", records=read())


def _require_different(names: Sequence[str], *, path: Path) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"the columns of {str(path)!r} must have different names, but {twice!r} is there twice.")


def _parse_delimited(path: Path, *, delimiter: str, quoting: Literal[0, 3]) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yields each row that is not blank, with the line where it begins."""
    reader = csv.reader(read_lines(path), delimiter=delimiter, quoting=quoting, strict=True)
    number = 1
    with _long_fields():
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ConfigError(_explain(error, path=path, first=number, last=reader.line_num)) from error
            if row:
                yield number, row
            number = reader.line_num + 1


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _explain(error: csv.Error, *, path: Path, first: int, last: int) -> str:
    if "unexpected end" in str(error) or "field limit" in str(error):
        return (
            f"a quote that opens must close, but one in the row of line {first} of {str(path)!r} does not. "
            "Write a quote inside of a text twice."
        )
    return f"line {last} of {str(path)!r} must be a row of a {path.suffix[1:]} file, but has this: {error}."


def _wrong_width(path: Path, number: int, row: Sequence[str], header: Sequence[str], *, quoting: Literal[0, 3]) -> str:
    hint = (
        "A text in a tsv has no tab and no line break, and quotes mean nothing: save it as csv."
        if quoting == csv.QUOTE_NONE
        else 'Put quotes around a text with commas: "so, and so".'
    )
    return (
        f"line {number} of {str(path)!r} must have {len(header)} columns as the header has, but has {len(row)}. {hint}"
    )


def _read_csv(path: Path, choose: ColumnChoice) -> Records:
    """Quotes as in RFC 4180."""
    return _read_delimited(path, choose, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path, choose: ColumnChoice) -> Records:
    """As IANA's text/tab-separated-values: a line is a row, a tab ends a field, and quotes are ordinary characters."""
    return _read_delimited(path, choose, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_jsonl(path: Path, choose: ColumnChoice) -> Records:
    return _choose_keys(path, _parse_json_lines(path), choose)


def _read_json(path: Path, choose: ColumnChoice) -> Records:
    """One array of objects; or JSON lines under the other name."""
    first = next((line.strip() for line in read_lines(path) if line.strip()), "")
    if not first.startswith("["):
        return _read_jsonl(path, choose)
    rows = _parse_json("".join(read_lines(path)), place=repr(str(path)))
    return _choose_keys(path, enumerate(rows, start=1), choose, unit="row")


def _parse_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield number, _parse_json(line, place=f"line {number} of {str(path)!r}")


def _parse_json(text: str, *, place: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{place} must be JSON, but has this: {error.msg} (line {error.lineno}, column {error.colno} of it)."
        ) from error
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place} must be valid Unicode, but has half of a surrogate pair.") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise ConfigError(f"{place} must be JSON that Python can read, but has this: {error}.") from error
    return value


def _choose_keys(path: Path, rows: Iterable[tuple[int, Any]], choose: ColumnChoice, *, unit: str = "line") -> Records:
    """Reads the keys of objects; those that the first one has are the columns."""
    remaining = iter(rows)
    first = next(remaining, None)
    if first is None:
        raise ConfigError(f"{str(path)!r} must have rows, but is empty.")
    _require_object(first[1], place=f"{unit} {first[0]} of {str(path)!r}")
    names = list(choose(list(first[1]), repr(str(path))))

    def read() -> Iterator[tuple[int, Sequence[Any]]]:
        for number, row in itertools.chain([first], remaining):
            _require_object(row, place=f"{unit} {number} of {str(path)!r}")
            yield number, [row.get(name) for name in names]

    return Records(names=names, unit=unit, records=read())


def _require_object(row: Any, *, place: str) -> None:
    if not isinstance(row, dict):
        raise ConfigError(
            f'{place} must be a JSON object such as {{"text": "...", "label": "..."}}, but is {row!r:.40}.'
        )


def _read_parquet(path: Path, choose: ColumnChoice) -> Records:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_different(file.schema_arrow.names, path=path)
            names = list(choose(file.schema_arrow.names, repr(str(path))))
            table = file.read(columns=names)
        columns = [table.column(name).to_pylist() for name in names]
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{str(path)!r} must be a parquet file, but can't be read: {first_line(error)}.") from error
    return Records(names=names, unit="row", records=enumerate(zip(*columns, strict=True), start=1))


READERS: Mapping[str, Callable[[Path, ColumnChoice], Records]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""By the end of a file's name."""
