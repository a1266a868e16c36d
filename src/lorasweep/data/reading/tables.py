"""Reads columns of texts and labels from files or from a data set of the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset

from lorasweep.config.data import Delimiter, FileSettings, Quoting, SplitSettings
from lorasweep.data.reading.files import (
    DEFAULT_RULES,
    Columns,
    TableFile,
    find_kind,
    find_tables,
    open_delimited,
    open_json,
    open_parquet,
    refuse_unreadable,
)
from lorasweep.data.reading.hub import find_class_names, load_hub, select_columns
from lorasweep.errors import ConfigError
from lorasweep.wording import nearest, shorten

T = TypeVar("T")

ChooseColumns = Callable[[Sequence[str], str], Sequence[str]]
"""Takes the column names of a file and the file's name. Returns the columns to read. Raises ConfigError if a wanted
column is missing."""
QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"')
"""A field in quotes as in RFC 4180, which doubles quotes inside it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """The chosen columns of one split: from one or several files, or from a hub data set."""

    columns: Columns
    sources: Sequence[tuple[int, str]]
    """For each file: the index of its first row in this table, and its name."""
    can_skip_rows: bool = False
    """Whether unusable rows are skipped and counted (users can't correct a hub data set). Otherwise they are errors."""
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By column: the names of its classes in the order of the hub data set, if it states them."""
    groups: Sequence[Any] | None = None
    """The values of the column that `data.group` names; None if it names none."""
    notes: Sequence[str] = ()
    """Sentences for the user on how the files were read."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def locate(self, row: int) -> str:
        """Returns where a row came from, such as `row 12 of 'reviews.csv'`. The row below the header is row 1."""
        first, name = [source for source in self.sources if source[0] <= row][-1]
        return f"row {row - first + 1} of {name!r}"


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenTable:
    """A split whose column names are known, and whose rows are not read yet."""

    source: str
    """Name of the file or hub data set, for messages."""
    names: Sequence[str]
    read: Callable[[Sequence[str]], Table]
    """Takes names of columns and reads these. Raises ConfigError if a file is damaged, or lacks a column or rows."""
    hint: str = ""
    """What to do if a wanted column is missing: a sentence with a space before it, or an empty text."""


def open_tables(config: SplitSettings, choose: ChooseColumns) -> Callable[[str], Table]:
    """Returns a function that takes the name of a split and reads its table.

    Raises:
        ConfigError: A file, data set, split or column does not exist. This is checked at once for all splits, so that a
            wrong test file is found before training.
    """
    opened = _open_splits(config) if config.path is None else _open_hub(config)
    wanted = {}
    for split, table in opened.items():
        try:
            wanted[split] = choose(table.names, repr(table.source))
            choose_columns([("group", config.group)], table.names, repr(table.source))
        except ConfigError as error:
            raise ConfigError(f"{error}{table.hint}") from error

    def load(split: str) -> Table:
        names = wanted[split]
        if config.group is None:
            return opened[split].read(names)
        table = opened[split].read(list(dict.fromkeys([*names, config.group])))  # `names` may have the group too
        columns = {name: table.columns[name] for name in names}
        return replace(table, columns=columns, groups=table.columns[config.group])

    return load


def _open_splits(config: SplitSettings) -> dict[str, OpenTable]:
    assert isinstance(config, FileSettings)  # `data=text` reads files whole
    found = {split: find_tables(name, key=f"data.{split}") for split, name in config.given.items()}
    return {
        split: open_files(files, columns=config.columns, delimiter=config.delimiter, quoting=config.quoting)
        for split, files in found.items()
    }


def _open_hub(config: SplitSettings) -> dict[str, OpenTable]:
    def open_dataset(dataset: Dataset, source: str) -> OpenTable:
        def read(names: Sequence[str]) -> Table:
            columns, class_names = select_columns(dataset, names), find_class_names(dataset, names)
            return Table(columns=columns, sources=[(0, source)], can_skip_rows=True, class_names=class_names)

        return OpenTable(source=source, names=dataset.column_names, read=read)

    return {
        split: open_dataset(dataset, f"{config.path}, {config.given[split]}")
        for split, dataset in load_hub(config).items()
    }


def open_files(
    files: Sequence[Path],
    *,
    columns: Sequence[str] | None = None,
    delimiter: Delimiter = "auto",
    quoting: Quoting = "auto",
) -> OpenTable:
    """Returns the rows of files of one kind, one file after the other. Only the names of the columns are read now.

    Args:
        files: At least one file.
        columns: `data.columns`.
        delimiter: `data.delimiter`.
        quoting: `data.quoting`.

    Raises:
        ConfigError: A file is damaged or empty, or a setting does not fit the files.
    """
    kind = find_kind(files[0])
    is_delimited = kind in DEFAULT_RULES
    if not is_delimited and (columns, delimiter, quoting) != (None, "auto", "auto"):
        raise ConfigError(
            f"`data.columns` must be null, and `data.delimiter` and `data.quoting` auto, for {str(files[0])!r}, which "
            f"names its fields, but got {columns}, {delimiter} and {quoting}."
        )
    opened: dict[Path, TableFile] = {}
    for path in files:
        with refuse_unreadable(path, kind=f"{kind[1:]} file"):
            if is_delimited:
                opened[path] = open_delimited(path, columns=columns, delimiter=delimiter, quoting=quoting)
            else:
                opened[path] = open_parquet(path) if kind == ".parquet" else open_json(path)

    def read(names: Sequence[str]) -> Table:
        values: Columns = {name: [] for name in names}
        sources = []
        for path, file in opened.items():
            for name in names:
                if name not in file.names:
                    raise ConfigError(
                        f"{str(path)!r} must have a column {name!r}, but has {shorten([*file.names], 400)}."
                    )
            with refuse_unreadable(path, kind=f"{kind[1:]} file"):
                new_values = file.read(names)
            if not new_values[names[0]]:
                raise ConfigError(f"{str(path)!r} must have rows, but has none.")
            sources.append((len(values[names[0]]), str(path)))
            for name in names:
                values[name] += new_values[name]
        notes: list[str] = []
        if is_delimited and quoting == "auto" and DEFAULT_RULES[kind][1] == "none" and (count := count_quoted(values)):
            notes = [
                f"{count} texts of {str(files[0])!r} look quoted, and the quotes stay in the texts. If the file puts "
                "quotes around fields, set `data.quoting=csv`. If not, `data.quoting=none` ends this note."
            ]
        return Table(columns=values, sources=sources, notes=notes)

    hint = " If its first line is data, set `data.columns`. If its fields are not separated, set `data.delimiter`."
    return OpenTable(
        source=str(files[0]),
        names=opened[files[0]].names,
        read=read,
        hint=hint if is_delimited and columns is None else "",
    )


def count_quoted(columns: Columns) -> int:
    """Returns how many texts are in quotes as in RFC 4180; 0 if a text has quotes elsewhere, as in speech."""
    with_quotes = [value for values in columns.values() for value in values if '"' in value]
    return len(with_quotes) if all(map(QUOTED_FIELD.fullmatch, with_quotes)) else 0


def parse_rows(table: Table, parse: Callable[..., T]) -> tuple[list[T], list[str]]:
    """Returns each row parsed with `parse`, and notes: those of the table, and how many rows are skipped if any are.

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
        return parsed, [*table.notes]
    if not table.can_skip_rows:
        raise ConfigError(f"{problems[0]}. Correct or remove the row. {len(problems)} rows have a problem.")
    name, first = table.sources[0][1], f"The first problem: {problems[0]}."
    if not parsed:
        raise ConfigError(f"{name!r} must have usable rows, but has none. {first}")
    return parsed, [*table.notes, f"{len(problems)} of {len(table)} rows of {name!r} are skipped. {first}"]


def _require_group(value: Any) -> str:
    check_plain(value)
    if value is None or not str(value).strip():
        raise ValueError(f"must have a value in the column of `data.group`, but has {value!r}")
    return str(value).strip()


def require_text(value: Any) -> str:
    """Returns a value that is a text and not blank; raises ValueError otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must have a text, but has {shorten(value)}")
    check_plain(value)
    return value


def check_plain(value: Any) -> None:
    """Raises ValueError if a value is a list, a mapping or bytes, or a text with half of a surrogate pair."""
    if isinstance(value, list | tuple | dict | bytes):
        raise ValueError(f"must have texts and numbers, but has {shorten(value)}")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"must have texts in valid Unicode, but has {shorten(value)}") from error


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
