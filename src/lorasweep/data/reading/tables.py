"""Opens the tables that settings name, in files or on the hub, and parses their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorasweep.config.data import RowSettings, SplitSettings
from lorasweep.console import say_note
from lorasweep.data.reading.files import refuse_unreadable
from lorasweep.data.reading.local import ChooseColumns, Table, find_tables, read_file
from lorasweep.data.source import MAX_NAMED_ROWS
from lorasweep.errors import ConfigError
from lorasweep.wording import format_bytes, join_words, shorten, suggest_nearest

T = TypeVar("T")

MAX_SILENT_BYTES = 10_000_000
"""Maximum size of a split that is read without a message. Reading more takes seconds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitTables:
    """The rows of one split."""

    tables: Sequence[Table]
    """One table for each file, so that messages can number the rows of a file; one table for a hub data set."""
    columns: Sequence[str]
    """The columns that a parser gets."""
    group: str | None = None
    """The column that `data.group` names."""
    keeps_rows: bool = False
    """Whether the parser of a row also gets the whole row, as `row`."""
    is_from_hub: bool = False
    """Whether unusable rows are skipped and counted, because users can't correct them. In a file they are errors."""


def open_tables(config: SplitSettings, choose: ChooseColumns, *, keeps_rows: bool = False) -> dict[str, SplitTables]:
    """Returns the rows of each split that the settings name; `choose` chooses the columns.

    Raises ConfigError if a file, data set, split or column does not exist, or a file is damaged. All splits are read
    at once, so that a wrong test file is found before training.
    """
    return {split: _open_split(config, split, choose, keeps_rows=keeps_rows) for split in config.sources}


def _open_split(config: SplitSettings, split: str, choose: ChooseColumns, *, keeps_rows: bool) -> SplitTables:
    chosen: dict[str, tuple[str, ...]] = {}

    def choose_with_group(names: Sequence[str], source: str) -> Sequence[str]:
        chosen[source] = tuple(choose(names, source))
        group = choose_columns([("group", config.group)], names, source)
        return names if keeps_rows else [*chosen[source], *group]

    tables = load_tables(config, split, choose_with_group)
    first, columns = next(iter(chosen.items()))
    for source, others in chosen.items():
        if others != columns:
            raise ConfigError(
                f"`data.{split}` must name files with the same columns, but {list(columns)} of {first} and "
                f"{list(others)} of {source} would be read. Rename the columns, or narrow the glob."
            )
    is_from_hub = config.path is not None
    return SplitTables(
        tables=tables, columns=columns, group=config.group, keeps_rows=keeps_rows, is_from_hub=is_from_hub
    )


def load_tables(config: SplitSettings, split: str, choose: ChooseColumns) -> list[Table]:
    """Returns the chosen columns of a split: one table for each file, or one of the hub. Errors as in `open_tables`."""
    given, key = config.sources[split], f"data.{split}"
    if config.path is None:
        assert isinstance(config, RowSettings)  # settings of other tasks read whole files
        files = find_tables(given, key=key)
        _announce(sum(file.stat().st_size for file in files), split)
        return [read_file(path, config, choose) for path in files]
    from lorasweep.data.reading.hub import load_hub  # noqa: PLC0415 (`datasets` is slow to import)

    dataset = load_hub(config.path, subset=config.subset, revision=config.revision, split=given, key=key)
    name = f"{config.path}, {given}"
    columns = list(dict.fromkeys(choose(dataset.column_names, repr(name))))
    _announce(dataset.data.nbytes, split)
    with refuse_unreadable(Path(name)):  # a date of a parquet file may be out of Python's range
        values = dataset.select_columns(columns)[:]
    names = {column: getattr(dataset.features[column], "names", None) for column in columns}
    return [Table(name=name, columns=values, class_names={column: tuple(n) for column, n in names.items() if n})]


def _announce(num_bytes: int, split: str) -> None:
    if num_bytes > MAX_SILENT_BYTES:
        say_note(f"reads {format_bytes(num_bytes)} of {split}")


def parse_rows(split: SplitTables, parse: Callable[..., T]) -> tuple[list[T], list[str]]:
    """Returns each row parsed with `parse`, and a note on rows that are skipped.

    `parse` takes the values of a row, and `group` (the value of `data.group`). For an unusable row it raises ValueError
    with the message "must have X, but has Y".

    Raises:
        ConfigError: A row of a file is unusable, or all rows of a hub data set are.
    """
    parsed: list[T] = []
    problems: list[tuple[str, str]] = []  # the place of a row, and what is wrong there
    for table in split.tables:
        name, columns = table.name, {column: table.get_values(column) for column in table.columns}
        groups = columns[split.group] if split.group else None
        for index, values in enumerate(zip(*(columns[column] for column in split.columns), strict=True)):
            try:
                group = None if groups is None else _require_group(groups[index])
                whole = {"row": {key: column[index] for key, column in columns.items()}} if split.keeps_rows else {}
                parsed.append(parse(*values, group=group, **whole))
            except ValueError as error:
                fields = zip(split.columns, values, strict=True)
                shown = ", ".join(f"`{column}` {shorten(value, 40)}" for column, value in fields)
                problems.append((f"row {index + 1} of {name!r}", f"{error}. The row has {shown}."))
    if not problems:
        return parsed, []
    first = " ".join(problems[0])
    if not split.is_from_hub:
        of_file = "".join(problems[0][0].partition(" of ")[1:])
        others = [place.removesuffix(of_file) for place, _ in problems[1:MAX_NAMED_ROWS]]
        also = f" {len(problems)} rows have a problem, also {join_words(others)}." if others else ""
        raise ConfigError(f"{first} Correct or remove it.{also}")
    if not parsed:
        raise ConfigError(f"{name!r} must have usable rows, but has none. The first problem: {first}")
    skipped = f"{len(problems)} of {len(parsed) + len(problems)} rows of {name!r} are skipped."
    return parsed, [f"{skipped} The first problem: {first}"]


def _require_group(value: Any) -> str:
    require_scalar(value)
    if value is None or not str(value).strip():
        raise ValueError(f"must have a value in the column of `data.group`, but has {value!r}")
    return str(value).strip()


def require_text(value: Any) -> str:
    """Returns a value that is a text and not blank; raises ValueError otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must have a text, but has {shorten(value)}")
    return value


def require_scalar(value: Any) -> None:
    """Raises ValueError if a value is a list, a mapping or bytes."""
    if isinstance(value, list | tuple | dict | bytes):
        raise ValueError(f"must have texts and numbers, but has {shorten(value)}")


def choose_columns(wanted: Iterable[tuple[str, str | None]], names: Sequence[str], source: str) -> list[str]:
    """Returns the names of the wanted columns, each given with its key below `data`; None is skipped.

    Raises ConfigError if a wanted column is missing among the `names` of the table `source`.
    """
    chosen = [(key, name) for key, name in wanted if name is not None]
    for key, name in chosen:
        if name not in names:
            raise ConfigError(
                f"`data.{key}` must be a column of {source}, but got {name!r}.{suggest_nearest(name, names)} "
                f"Its columns are {shorten(list(names), 400)}. Name yours: `data.{key}=COLUMN`."
            )
    return [name for _, name in chosen]
