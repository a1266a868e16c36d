"""Opens files of texts and tables, also compressed by gzip. What can't be read is a ConfigError with the file's name.

csv, tsv and txt files are read by `pandas.read_csv`, which `datasets` calls too, but with every value as a text and
without a copy in a cache. JSON is read by `json`, because the reader of `datasets` turns a text that looks like a date
into a date.
"""

from __future__ import annotations

import csv
import functools
import glob
import io
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pandas
import pyarrow
import pyarrow.parquet
from pandas.errors import ParserError, ParserWarning

from lorasweep.config.data import Delimiter, Quoting
from lorasweep.data.reading.bounded import MAX_COLUMNS, open_bounded
from lorasweep.data.reading.parquet import read_columns
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import nearest, shorten

Columns = dict[str, list[Any]]

DELIMITERS: Mapping[Delimiter, str] = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
DEFAULT_RULES: Mapping[str, tuple[Delimiter, Quoting]] = {
    ".csv": ("comma", "csv"),
    ".tsv": ("tab", "none"),
    ".txt": ("tab", "none"),
}
"""Delimiter and quoting of each kind of delimited file under `auto`."""
KINDS = (*DEFAULT_RULES, ".jsonl", ".json", ".parquet")
"""Suffixes of the table files that can be read."""


class TableFile(NamedTuple):
    """An open file: the names of its columns, and a function that takes some of the names and reads these columns."""

    names: Sequence[str]
    read: Callable[[Sequence[str]], Columns]


def find_files(given: str, *, key: str) -> list[Path]:
    """Returns the files that a path or glob names, sorted by name. A folder is returned as itself.

    Args:
        given: Value of the setting.
        key: Dotted key of the setting, for messages.

    Raises:
        ConfigError: No such file exists.
    """
    try:
        path = Path(given).expanduser()
        if path.exists():  # checked before the glob, because `odd[1].csv` may be the name of a file
            if not path.is_file() and not path.is_dir():  # reading a pipe or a device may wait or go on for ever
                raise ConfigError(
                    f"`{key}` must name a file or folder, but {given!r} is a pipe, a socket or a device. Write its "
                    "content to a file."
                )
            return [path]
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            names = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ConfigError(f"`{key}` must name an existing file, but got {given!r}.{nearest(given, names)}")
        return found
    except (OSError, RuntimeError) as error:  # a folder is closed to this user, a name is too long, ~USER is unknown
        raise ConfigError(
            f"`{key}` must name an existing file, but got {shorten(given, 400)}: {first_line(error)}."
        ) from error


def find_tables(given: str, *, key: str) -> list[Path]:
    """Returns the table files that a setting names, without reading them.

    Raises:
        ConfigError: No such file exists, or the files are not of one known kind.
    """
    files = find_files(given, key=key)
    kinds = {find_kind(file) for file in files}
    if len(kinds) > 1 or not kinds <= {*KINDS}:
        raise ConfigError(
            f"`{key}` must name files of one kind ({', '.join(KINDS)}), but got {given!r}. Save them as one kind, "
            "narrow the glob, or rename a file without a suffix (`.txt`: tabs between its fields)."
        )
    return files


def find_kind(path: Path) -> str:
    """Returns the suffix of a file's name in lower case, such as `.csv` for `a.csv` and `A.CSV.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextmanager
def refuse_unreadable(path: Path, *, kind: str) -> Iterator[None]:
    """Raises ConfigError instead of the errors that libraries raise for a file that is damaged or of another kind."""
    try:
        yield
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} must be a {kind} in UTF-8, but {error}. Save it as UTF-8.") from error
    except (OSError, EOFError, ValueError, OverflowError, RecursionError, zlib.error, pyarrow.ArrowException) as error:
        raise ConfigError(f"{str(path)!r} must be a {kind}, but can't be read: {first_line(error)}.") from error


def open_text(path: Path, *, counts_values: bool = False) -> TextIO:
    """Opens a UTF-8 file, also one compressed by gzip, without its byte order mark. Line ends stay as they are.

    Args:
        path: A regular file.
        counts_values: Whether the number of values is limited too, as it is for tables.
    """
    return io.TextIOWrapper(open_bounded(path, counts_values=counts_values), encoding="utf-8-sig", newline="\n")


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, also of one compressed by gzip, without a byte order mark.

    Raises:
        ConfigError: The file can't be read, or is not UTF-8.
    """
    with refuse_unreadable(path, kind="text file"), open_text(path) as file:
        return file.read()


def open_delimited(path: Path, *, columns: Sequence[str] | None, delimiter: Delimiter, quoting: Quoting) -> TableFile:
    """Opens a csv, tsv or txt file. Every value stays a text. Fields that a line lacks at its end are empty texts.

    Args:
        path: The file.
        columns: `data.columns`.
        delimiter: `data.delimiter`.
        quoting: `data.quoting`.

    Raises:
        ConfigError: `columns` does not fit the first line.
        OSError, ValueError, EOFError, zlib.error: The file can't be read.
    """
    default_delimiter, default_quoting = DEFAULT_RULES[find_kind(path)]
    is_quoted = (default_quoting if quoting == "auto" else quoting) == "csv"
    separator = DELIMITERS[default_delimiter if delimiter == "auto" else delimiter]
    with open_text(path) as file:
        if file.readline().count(separator) >= MAX_COLUMNS:
            raise ConfigError(f"{str(path)!r} must have at most {MAX_COLUMNS:,} columns, but its first line has more.")
    options: dict[str, Any] = {
        "sep": separator,
        "quoting": csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
        "dtype": object,  # texts, not numbers or dates
        "na_filter": False,  # otherwise the text NA would be lost
        "index_col": False,  # otherwise the first field would be lost in a file whose rows are longer than its header
        "encoding": "utf-8-sig",
        "low_memory": False,  # otherwise pandas reads and checks the file in chunks
    }

    def read_csv(**more: Any) -> pandas.DataFrame:
        with open_bounded(path, counts_values=True) as file:
            return pandas.read_csv(file, **options, **more)

    first_row = [str(value).strip() for value in read_csv(header=None, nrows=1).iloc[0]]
    names = first_row if columns is None else list(columns)
    if len(names) != len(first_row):
        raise ConfigError(
            f"`data.columns` must name the fields of each line of {str(path)!r}, but got {names} for the first line "
            f"with {len(first_row)} fields: {shorten(first_row, 400)}. If it is cut wrongly, set `data.delimiter`."
        )
    if columns is not None and names == first_row:
        raise ConfigError(
            f"`data.columns` must be null for a file with a header, but got {names}, the first line of {str(path)!r}."
        )

    def read(chosen: Sequence[str]) -> Columns:
        try:
            with warnings.catch_warnings(action="error", category=ParserWarning):
                rows = read_csv(header=0 if columns is None else None, names=columns)
        except ParserError as error:
            raise _wrong_fields(path, names, str(error).strip().rpartition("C error: ")[2]) from error
        except ParserWarning as error:  # the first row has surplus fields, which pandas would drop
            raise _wrong_fields(path, names, "row 1 has more") from error
        return {name: rows.iloc[:, names.index(name)].tolist() for name in chosen}

    return TableFile(names, read)


def _wrong_fields(path: Path, names: Sequence[str], problem: str) -> ConfigError:
    return ConfigError(
        f"{str(path)!r} must have {len(names)} fields in each line, but {problem}. Put quotes around a text "
        "with the delimiter in it, or set `data.delimiter` or `data.quoting` (csv or none)."
    )


def open_json(path: Path) -> TableFile:
    """Opens a file with a JSON object in each line, or with one array of objects. The first object has the columns.

    Raises:
        ConfigError: The file has no rows, a row is not an object, or a line is not JSON.
        OSError, ValueError, EOFError, RecursionError, zlib.error: The file can't be read.
    """
    first_row = next(_iterate_json(path), None)
    if first_row is None:
        raise ConfigError(f"{str(path)!r} must have rows, but has none.")

    def read(chosen: Sequence[str]) -> Columns:
        rows = list(_iterate_json(path))
        return {name: [row.get(name) for row in rows] for name in chosen}

    return TableFile(list(first_row), read)


def _iterate_json(path: Path) -> Iterator[Mapping[str, Any]]:
    with open_text(path, counts_values=True) as file:
        for number, line in enumerate(file, start=1):  # only "\n" ends a line, because a text may contain U+2028
            if not line.strip():
                continue
            if line.lstrip().startswith("["):
                rows = json.loads(line + file.read())
            else:
                try:
                    rows = [json.loads(line)]
                except json.JSONDecodeError as error:
                    place = f"line {number} of {str(path)!r}"
                    raise ConfigError(f"{place} must be JSON, but can't be read: {error}.") from error
            for row in rows:
                if not isinstance(row, Mapping):
                    raise ConfigError(f"{str(path)!r} must have JSON objects as rows, but has other values.")
                yield row


def open_parquet(path: Path) -> TableFile:
    """Opens a parquet file.

    Raises:
        OSError, ValueError, pyarrow.ArrowException: The file can't be read.
    """
    return TableFile(pyarrow.parquet.read_schema(path).names, functools.partial(read_columns, path))
