"""Reads columns of texts and labels from files or from a data set of the hub.

Files are not read with `datasets.load_dataset`, because it guesses types: the text `NA` would be lost, the label `01`
would become 1, and a text that looks like a date would become a date.
"""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.parquet

from lorasweep.config.data import SplitSettings
from lorasweep.data.reading.hub import find_class_names, load_hub, select_columns
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import nearest, shorten

T = TypeVar("T")

csv.field_size_limit(sys.maxsize)  # Python's default of 131,072 characters is less than some texts have

Columns = dict[str, list[Any]]
ChooseColumns = Callable[[Sequence[str], str], Sequence[str]]
"""Takes the column names of a file and the file's name. Returns the columns to read. Raises ConfigError if a wanted
column is missing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The chosen columns of one split: from one or several files, or from a hub data set."""

    columns: Columns
    sources: Sequence[tuple[int, str]]
    """For each file: the index of its first row in this table, and its name."""
    can_skip_rows: bool = False
    """Whether unusable rows are skipped and counted (users can't correct a hub data set). Otherwise they are errors."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of the hub data set; empty if it does not state them."""
    groups: Sequence[Any] | None = None
    """The values of the column that `data.group` names; None if it names none."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def locate(self, row: int) -> str:
        """Returns where a row came from, such as `row 12 of 'reviews.csv'`. The row below the header is row 1."""
        first, name = [source for source in self.sources if source[0] <= row][-1]
        return f"row {row - first + 1} of {name!r}"


def open_tables(config: SplitSettings, choose: ChooseColumns) -> Callable[[str], Table]:
    """Returns a function that takes the name of a split and reads its table.

    Raises:
        ConfigError: A file, data set or split does not exist. This is checked at once for all splits.
    """

    def choose_all(names: Sequence[str], source: str) -> list[str]:
        group = choose_columns([("group", config.group)], names, source)
        return list(dict.fromkeys([*choose(names, source), *group]))  # `choose` may return the group column too

    def separate_groups(table: Table) -> Table:
        if config.group is None:
            return table
        names = choose(list(table.columns), table.sources[0][1])
        columns = {name: table.columns[name] for name in names}
        return replace(table, columns=columns, groups=table.columns[config.group])

    if config.path is None:
        files = {split: find_tables(name, key=f"data.{split}") for split, name in config.given.items()}
        return lambda split: separate_groups(read_files(files[split], choose=choose_all))
    path, splits = config.path, load_hub(config)

    def load(split: str) -> Table:
        dataset, name = splits[split], f"{path}, {config.given[split]}"
        table = Table(
            columns=select_columns(dataset, choose_all(dataset.column_names, repr(name))),
            sources=[(0, name)],
            can_skip_rows=True,
            class_names=find_class_names(dataset, choose(dataset.column_names, repr(name))),
        )
        return separate_groups(table)

    return load


def find_files(given: str, *, key: str) -> list[Path]:
    """Returns the files that a path or glob names, sorted by name. A folder is returned as itself.

    Args:
        given: Value of the setting.
        key: Dotted key of the setting, for messages.

    Raises:
        ConfigError: No such file exists.
    """
    path = Path(given).expanduser()
    if path.exists():
        return [path]  # checked before the glob, because `odd[1].csv` may be the name of a file
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        names = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"`{key}` must name an existing file, but got {given!r}.{nearest(given, names)}")
    return found


def find_tables(given: str, *, key: str) -> list[Path]:
    """Returns the table files that a setting names, without reading them.

    Raises:
        ConfigError: No such file exists, or the files do not share one known suffix.
    """
    files = find_files(given, key=key)
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1 or suffixes[0] not in READERS:
        raise ConfigError(
            f"`{key}` must name files of one kind ({', '.join(READERS)}), but got {given!r}. "
            "Save them as one kind, or narrow the glob."
        )
    return files


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file without a byte order mark. Line ends stay as they are.

    Raises:
        ConfigError: The file can't be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} must be a text file in UTF-8, but {error}. Save it as UTF-8.") from error


def read_files(files: Sequence[Path], *, choose: ChooseColumns) -> Table:
    """Returns the chosen columns of files of one kind, one file after the other.

    Raises:
        ConfigError: A file is damaged or has no rows, or a column is missing.
    """
    columns: Columns = {}
    sources = []
    for file in files:
        try:
            new_columns = READERS[file.suffix.lower()](file, choose)
        except (OSError, UnicodeError, csv.Error, json.JSONDecodeError, pyarrow.ArrowException) as error:
            raise ConfigError(
                f"{str(file)!r} must be a {file.suffix[1:]} file, but can't be read: {first_line(error)}."
            ) from error
        sources.append((len(next(iter(columns.values()), ())), str(file)))
        for name in columns or new_columns:
            if name not in new_columns:
                raise ConfigError(f"{str(file)!r} must have a column {name!r} like {str(files[0])!r}, but has not.")
            columns.setdefault(name, []).extend(new_columns[name])
    return Table(columns=columns, sources=sources)


def _read_delimited(path: Path, choose: ChooseColumns) -> Columns:
    """Reads csv as in RFC 4180, or tsv, where quotes are ordinary characters. Every value stays a text."""
    is_tsv = path.suffix.lower() == ".tsv"
    quoting: Any = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if is_tsv else ",", quoting=quoting, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        rows = []
        for row in reader:
            # DictReader stores surplus fields under the key None, and None as the value of a missing field.
            if None in row or None in row.values():
                raise ConfigError(
                    f"line {reader.line_num} of {str(path)!r} must have {len(reader.fieldnames)} columns like its "
                    "header, but has more or fewer. In a csv file, put quotes around a text with commas."
                )
            rows.append(row)
    return _select_keys(path, rows, choose)


def _read_json(path: Path, choose: ChooseColumns) -> Columns:
    """Reads one JSON object per line, or one array of objects."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return _select_keys(path, json.loads(text), choose)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028 inside a text
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ConfigError(f"line {number} of {str(path)!r} must be JSON, but can't be read: {error}.") from error
    return _select_keys(path, rows, choose)


def _read_parquet(path: Path, choose: ChooseColumns) -> Columns:
    names = choose(pyarrow.parquet.read_schema(path).names, repr(str(path)))
    columns: Columns = pyarrow.parquet.read_table(path, columns=list(names)).to_pydict()
    return columns


READERS: Mapping[str, Callable[[Path, ChooseColumns], Columns]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""The function that reads a file, by the suffix of its name."""


def _select_keys(path: Path, rows: Sequence[Mapping[str, Any]], choose: ChooseColumns) -> Columns:
    """Returns rows as columns. The keys of the first row are the columns to choose from."""
    if not rows:
        raise ConfigError(f"{str(path)!r} must have rows, but has none.")
    if not all(isinstance(row, Mapping) for row in rows):
        raise ConfigError(f"{str(path)!r} must have JSON objects as rows, but has other values.")
    return {name: [row.get(name) for row in rows] for name in choose(list(rows[0]), repr(str(path)))}


def parse_rows(table: Table, parse: Callable[..., T]) -> tuple[list[T], list[str]]:
    """Returns each row parsed with `parse`, and a note with the number of skipped rows if there are any.

    Args:
        table: The rows to parse.
        parse: Takes the values of a row, and the row's group as `group=` (None if `data.group` is not set). Raises
            ValueError for an unusable row, with the message "must have X, but has Y".

    Raises:
        ConfigError: A row of a file is unusable, or all rows of a hub data set are.
    """
    parsed: list[T] = []
    problems: list[str] = []
    for row, values in enumerate(zip(*table.columns.values(), strict=True)):
        try:
            group = None if table.groups is None else _require_group(table.groups[row])
            parsed.append(parse(*values, group=group))
        except ValueError as error:
            problems.append(f"{table.locate(row)} {error}")
    if not problems:
        return parsed, []
    if not table.can_skip_rows:
        raise ConfigError(f"{problems[0]}. Correct or remove the row. {len(problems)} rows have a problem.")
    name, first = table.sources[0][1], f"The first problem: {problems[0]}."
    if not parsed:
        raise ConfigError(f"{name!r} must have usable rows, but has none. {first}")
    return parsed, [f"{len(problems)} of {len(table)} rows of {name!r} are skipped. {first}"]


def _require_group(value: Any) -> str:
    if value is None or not str(value).strip():
        raise ValueError(f"must have a value in the column of `data.group`, but has {value!r}")
    return str(value).strip()


def require_text(value: Any) -> str:
    """Returns a value that is a text and not blank; raises ValueError otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must have a text, but has {shorten(value)}")
    return value


def choose_columns(wanted: Iterable[tuple[str, str | None]], names: Sequence[str], source: str) -> list[str]:
    """Returns the names of the wanted columns.

    Args:
        wanted: Keys of settings below `data`, each with the column that it names or None.
        names: All columns of the file.
        source: Name of the file, for messages.

    Raises:
        ConfigError: A wanted column is missing.
    """
    chosen = [(key, name) for key, name in wanted if name is not None]
    for key, name in chosen:
        if name not in names:
            raise ConfigError(
                f"`data.{key}` must be a column of {source}, but got {name!r}.{nearest(name, names)} "
                f"Its columns are {shorten(list(names), 400)}."
            )
    return [name for _, name in chosen]
