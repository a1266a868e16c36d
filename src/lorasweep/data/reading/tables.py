"""Reads columns of tables with `datasets`: csv, tsv, txt, jsonl, json and parquet files, and data sets of the hub."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import sys
import warnings
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import datasets
import pandas
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from pandas.errors import ParserWarning

from lorasweep.config.data import Delimiter, Quoting, RowSettings, SplitSettings
from lorasweep.console import say
from lorasweep.data.reading.limits import MAX_LINE_BYTES, check_content
from lorasweep.errors import ConfigError, first_line
from lorasweep.hub import find_hub_fault
from lorasweep.wording import join_words, shorten, suggest_nearest

T = TypeVar("T")

ChooseColumns = Callable[[Sequence[str], str], Sequence[str]]
"""Takes the column names of a table and its name. Returns the columns to read. Raises ConfigError if one is missing."""
DELIMITERS: Mapping[Delimiter, str] = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
DEFAULT_DIALECTS: Mapping[str, tuple[Delimiter, Quoting]] = {
    ".csv": ("comma", "csv"),
    ".tsv": ("tab", "none"),
    ".txt": ("tab", "none"),
}
"""Delimiter and quoting under `auto`, unless quotes stand only around whole fields: then the quoting is `csv`."""
READERS: Mapping[str, str] = {
    **dict.fromkeys(DEFAULT_DIALECTS, "csv"),
    **dict.fromkeys((".jsonl", ".json"), "json"),
    ".parquet": "parquet",
}

MAX_SILENT_ROWS = 100_000
"""Reading more rows takes seconds, so a line says what happens."""
MAX_NAMED_ROWS = 10
"""Maximum number of wrong rows that an error names."""
MAX_GZIP_RATIO = 20
"""Highest assumed compression ratio of a JSON file. A file that is compressed more is read in several chunks, and the
first chunk decides the types of the columns."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """One split, whose rows are not read yet."""

    datasets: Mapping[str, Dataset]
    """Data sets by name: the hub's data set, or one for each file, so that messages can number the rows of a file."""
    columns: Sequence[str]
    """The chosen columns."""
    group: str | None = None
    """The column that `data.group` names."""
    keeps_rows: bool = False
    """Whether the parser of a row also gets the whole row, as `row`."""
    is_from_hub: bool = False
    """Unusable rows of the hub, which users can't correct, are skipped and counted. In a file they are errors."""


def open_tables(config: SplitSettings, choose: ChooseColumns) -> dict[str, Table]:
    """Returns the table of each split that the settings name.

    Raises ConfigError if a file, data set, split or column does not exist, or a file is damaged. All splits are checked
    at once, so that a wrong test file is found before training.
    """
    tables = {}
    for split in config.sources:
        loaded = load_datasets(config, split)
        if (num_rows := sum(map(len, loaded.values()))) > MAX_SILENT_ROWS:
            say(f"reads {num_rows:,} rows of {split}", file=sys.stderr)
        columns: Sequence[str] = ()
        for name, dataset in loaded.items():
            try:
                columns = choose(dataset.column_names, repr(name))
                choose_columns([("group", config.group)], dataset.column_names, repr(name))
            except ConfigError as error:
                is_delimited = config.path is None and find_suffix(Path(name)) in DEFAULT_DIALECTS
                hint = " See also `data.columns` (for a file without a header) and `data.delimiter`."
                raise ConfigError(f"{error}{hint if is_delimited else ''}") from error
        is_from_hub = config.path is not None
        tables[split] = Table(datasets=loaded, columns=columns, group=config.group, is_from_hub=is_from_hub)
    return tables


def load_datasets(config: SplitSettings, split: str) -> dict[str, Dataset]:
    """Returns the data sets of a split by name: one for each file, or one of the hub."""
    given = config.sources[split]
    rules = (config.columns, config.delimiter, config.quoting) if isinstance(config, RowSettings) else None
    files = [] if config.path is not None else find_tables(given, key=f"data.{split}")
    if rules not in (None, (None, "auto", "auto")) and not (files and find_suffix(files[0]) in DEFAULT_DIALECTS):
        raise ConfigError(
            "`data.columns` must be null, and `data.delimiter` and `data.quoting` auto, unless the files are csv, tsv "
            f"or txt, but got {rules}."
        )
    if config.path is not None:
        subset, revision, key = config.subset, config.revision, f"data.{split}"
        dataset = _load_hub(config.path, subset=subset, revision=revision, split=given, key=key)
        return {f"{config.path}, {given}": dataset}
    assert isinstance(config, RowSettings)  # `data=text` reads files whole
    return {str(path): _load_file(path, config) for path in files}


def find_hub_settings(path: str, *, subset: str | None = None, revision: str | None = None) -> dict[str, str]:
    """Returns the settings that name the splits of a data set of the hub and the commit that was read.

    Raises ConfigError if it is neither on the hub nor in its cache.
    """
    splits = _load_hub(path, subset=subset, revision=revision)
    names = {"data.train": ("train",), "data.validation": ("validation", "valid", "val", "dev"), "data.test": ("test",)}
    found = {key: next((name for name in usual if name in splits), None) for key, usual in names.items()}
    settings = {"data.path": path, **found, "data.train": found["data.train"] or next(iter(splits))}
    commits = set().union(*map(_find_commits, splits.values()))
    if len(commits) == 1 and not Path(path).expanduser().is_dir():
        settings["data.revision"] = commits.pop()
    return {key: value for key, value in settings.items() if value is not None}


def _load_hub(path: str, *, subset: str | None, revision: str | None, split: str | None = None, key: str = "") -> Any:
    """Returns a split of a data set of the hub, or all splits by name."""
    folder = Path(path).expanduser()
    source = str(folder.absolute()) if folder.is_dir() else path
    was_offline = datasets.config.HF_HUB_OFFLINE
    fault = None if folder.is_dir() or was_offline else find_hub_fault()
    try:
        datasets.config.HF_HUB_OFFLINE = was_offline or fault is not None  # its client would retry for half a minute
        dataset = load_dataset(source, subset, split=split, revision=revision)
    except Exception as error:  # each client and file format raises its own class of error
        named = (f", and `{key}` one of its splits,", f" with {split!r}") if split else (",", "")
        raise ConfigError(
            f"`data.path` must be a data set on the hub or in its cache, or a folder{named[0]} but {path!r}{named[1]} "
            f"can't be loaded: {fault or first_line(error)}. Check the spelling, `data.subset`, `data.revision` and "
            "the connection."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    # Without a network `datasets` ignores `revision` and takes the latest version in its cache. The cache keeps each
    # version in a folder that is named after the commit.
    commits = set().union(*map(_find_commits, [dataset] if split else dataset.values()))
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision) and commits != {revision}:
        raise ConfigError(
            f"`data.revision` must be a commit that is in the cache or can be downloaded, but got {revision!r}. "
            f"The cache has {', '.join(sorted(commits))}. Check the connection."
        )
    return dataset


def _find_commits(dataset: Dataset) -> set[str]:
    return {Path(file["filename"]).parent.name for file in dataset.cache_files}


def _load_file(path: Path, config: RowSettings) -> Dataset:
    kind = find_suffix(path)
    options: dict[str, Any] = {}
    if READERS[kind] == "json":
        num_bytes = path.stat().st_size * (MAX_GZIP_RATIO if path.suffix.lower() == ".gz" else 1)
        options = {
            "chunksize": max(num_bytes, 2**20),  # types are inferred from the first chunk, so it is the whole file
            "parse_agent_traces": False,  # a chat that looks like the log of an agent would need another package
        }
    surplus_fields_are_errors = warnings.catch_warnings(action="error", category=ParserWarning)
    with refuse_unreadable(path), surplus_fields_are_errors, quiet_datasets():
        if kind in DEFAULT_DIALECTS:
            options = _choose_csv_options(path, config)
        else:
            check_content(path, suffix=kind)
        escaped = glob.escape(str(path))  # a name may have brackets
        return load_dataset(READERS[kind], data_files=escaped, split="train", **options)


def _choose_csv_options(path: Path, config: RowSettings) -> dict[str, Any]:
    """Returns options of `pandas.read_csv`. Every value stays a text: `NA` and `01` are not converted."""
    kind, quoting = find_suffix(path), config.quoting
    default_delimiter, default_quoting = DEFAULT_DIALECTS[kind]
    separator = DELIMITERS[default_delimiter if config.delimiter == "auto" else config.delimiter]
    check_content(path, suffix=kind, separator=separator)
    if quoting == "auto":  # quotes that pandas wrote around fields would become part of the texts
        quoting = "csv" if default_quoting == "csv" or _has_csv_quotes(path, separator) else "none"
    options: dict[str, Any] = {
        "sep": separator,
        "quoting": csv.QUOTE_MINIMAL if quoting == "csv" else csv.QUOTE_NONE,
        "na_filter": False,  # otherwise the text NA would be lost
        "index_col": False,  # otherwise the first field would be lost in a file whose rows are longer than its header
        "encoding": "utf-8-sig",
    }
    names = config.columns or [str(name).strip() for name in pandas.read_csv(path, nrows=0, **options).columns]
    return {
        **options,
        "names": list(names),
        "header": None if config.columns else 0,
        "features": Features(dict.fromkeys(names, Value("string"))),
    }


def _has_csv_quotes(path: Path, separator: str) -> bool:
    """Returns whether a file has quotes, and they stand only around whole fields, or doubled inside such fields."""
    with open_text(path) as file:
        text = file.read()
    end = re.escape(separator)
    rest = re.sub(rf'(?:(?<=[{end}\n])|\A)"(?:[^"]|"")*+"(?=[{end}\n]|\Z)', "", text)
    return '"' not in rest and rest != text


@contextmanager
def refuse_unreadable(path: Path) -> Iterator[None]:
    """Raises ConfigError instead of the errors that libraries raise for a file that is damaged or of another kind."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # each reader raises its own classes
        cause = error.__cause__ or error  # `datasets` wraps the error of pandas or pyarrow
        kind = find_suffix(path)[1:] or "text"
        reason = _find_fault(path) or f"must be a {kind} file, but can't be read: {first_line(cause)}"
        if re.search("No columns to parse|corresponds to no data", reason):
            reason = "must have rows, but has none"
        hint = " See also `data.quoting`." if "EOF inside string" in reason else ""
        if "fields in line" in reason:
            hint = " Put quotes around a text that contains the delimiter, or set `data.delimiter`."
        raise ConfigError(f"{str(path)!r} {reason}.{hint}") from error


def _find_fault(path: Path) -> str | None:
    """Returns which line of a text file is not UTF-8 or JSON; None if there is none, or if the file can't be opened."""
    kind = find_suffix(path)
    if kind == ".parquet":
        return None
    with suppress(OSError, EOFError, zlib.error, RecursionError, ValueError), _open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig").strip()
                if kind == ".jsonl" and text:
                    json.loads(text)
            except UnicodeDecodeError:
                encoding = "utf-16" if line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "cp1252"
                remedy = f"iconv -f {encoding} -t utf-8 {path} > {path.with_stem(f'{path.stem}-utf8')}"
                return f"must be in UTF-8, but line {number} is not. Convert it, perhaps by `{remedy}`"
            except json.JSONDecodeError as error:
                problem = error.msg.removesuffix(" at")  # as in "Unterminated string starting at"
                return f"must have JSON on every line, but line {number} is wrong: {problem} at column {error.colno}"
    return None


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keeps `datasets` from printing progress bars, and errors that are raised anyway."""
    was_shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if was_shown:
            datasets.enable_progress_bars()


def find_files(given: str, *, key: str) -> list[Path]:
    """Returns the files that a path or glob names, sorted; a folder as itself. Raises ConfigError if none exists."""
    try:
        path = Path(given).expanduser()
        if path.exists():  # checked before the glob, because `odd[1].csv` may be the name of a file
            if not path.is_file() and not path.is_dir():  # reading a pipe or a device may wait or go on for ever
                raise ConfigError(f"`{key}` must name a file or folder, but {given!r} is a pipe, a socket or a device.")
            return [path]
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            names = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ConfigError(f"`{key}` must name an existing file, but got {given!r}.{suggest_nearest(given, names)}")
        return found
    except (OSError, RuntimeError) as error:  # a folder is closed to this user, a name is too long, ~USER is unknown
        raise ConfigError(
            f"`{key}` must name an existing file, but got {shorten(given, 400)}: {first_line(error)}."
        ) from error


def find_tables(given: str, *, key: str) -> list[Path]:
    """Returns the table files that a setting names. Raises ConfigError if there are none or of several kinds."""
    files = find_files(given, key=key)
    kinds = {find_suffix(file) for file in files}
    if len(kinds) > 1 or not kinds <= READERS.keys():
        raise ConfigError(
            f"`{key}` must name files of one kind ({', '.join(READERS)}), but got {given!r}. Save them as one kind, "
            "narrow the glob, or rename a file without a suffix (`.txt`: tabs between its fields)."
        )
    return files


def open_text(path: Path) -> TextIO:
    """Opens a UTF-8 file, also one compressed by gzip, without its byte order mark. Line ends become line feeds."""
    return cast(TextIO, _open(path, "rt", encoding="utf-8-sig"))


def _open(path: Path, mode: str, **options: Any) -> Any:
    return (gzip.open if path.suffix.lower() == ".gz" else open)(path, mode, **options)


def find_suffix(path: Path) -> str:
    """Returns the suffix of a file's name in lower case, such as `.csv` for `a.csv` and `A.CSV.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def parse_rows(table: Table, parse: Callable[..., T]) -> tuple[list[T], list[str]]:
    """Returns each row parsed with `parse`, and notes on rows that are skipped and on values that are not read.

    `parse` takes the values of a row, and as `group` its value of `data.group`. It raises ValueError for an unusable
    row, with the message "must have X, but has Y".

    Raises:
        ConfigError: A row of a file is unusable, or all rows of a hub data set are.
    """
    parsed: list[T] = []
    problems: list[tuple[str, str]] = []  # the place of a row, and what is wrong there
    notes: list[str] = []
    for name, dataset in table.datasets.items():
        # pandas names a column without a name `Unnamed: 2`. It comes from surplus commas, or from a text with commas.
        unnamed = [column for column in dataset.column_names if column.startswith("Unnamed: ")]
        if unnamed and (num_rows := sum(any(row.values()) for row in dataset.select_columns(unnamed))):
            notes.append(f"{num_rows} rows of {name!r} have values in columns without a name, which are not read.")
        wanted = dataset.column_names if table.keeps_rows else filter(None, (*table.columns, table.group))
        columns = read_columns(dataset, wanted, name=name)
        groups = columns[table.group] if table.group else None
        for index, values in enumerate(zip(*(columns[column] for column in table.columns), strict=True)):
            try:
                group = None if groups is None else _require_group(groups[index])
                whole = {"row": {key: column[index] for key, column in columns.items()}} if table.keeps_rows else {}
                parsed.append(parse(*values, group=group, **whole))
            except ValueError as error:
                fields = zip(table.columns, values, strict=True)
                shown = ", ".join(f"`{column}` {shorten(value, 40)}" for column, value in fields)
                problems.append((f"row {index + 1} of {name!r}", f"{error}. The row has {shown}."))
    if not problems:
        return parsed, notes
    first = " ".join(problems[0])
    if not table.is_from_hub:
        of_file = "".join(problems[0][0].partition(" of ")[1:])
        others = [place.removesuffix(of_file) for place, _ in problems[1:MAX_NAMED_ROWS]]
        also = f" {len(problems)} rows have a problem, also {join_words(others)}." if others else ""
        raise ConfigError(f"{first} Correct or remove it.{also}")
    if not parsed:
        raise ConfigError(f"{name!r} must have usable rows, but has none. The first problem: {first}")
    skipped = f"{len(problems)} of {len(parsed) + len(problems)} rows of {name!r} are skipped."
    return parsed, [*notes, f"{skipped} The first problem: {first}"]


def read_columns(dataset: Dataset, names: Iterable[str], *, name: str) -> dict[str, list[Any]]:
    """Returns the values of columns. A class index becomes a name, and a negative one (a hidden label) None."""
    with refuse_unreadable(Path(name)):  # a date of a parquet file may be out of Python's range
        columns: dict[str, list[Any]] = dataset.select_columns(list(dict.fromkeys(names)))[:]
    for column, values in columns.items():
        if names := get_class_names(dataset, column):
            columns[column] = [None if value is None or value < 0 else names[value] for value in values]
    return columns


def get_class_names(dataset: Dataset, column: str) -> tuple[str, ...]:
    """Returns the names of a column's classes in the order that the data set states; empty if it states none."""
    feature = dataset.features[column]
    return tuple(feature.names) if isinstance(feature, ClassLabel) and feature.names else ()


def _require_group(value: Any) -> str:
    require_scalar(value)
    if value is None or not str(value).strip():
        raise ValueError(f"must have a value in the column of `data.group`, but has {value!r}")
    return str(value).strip()


def require_text(value: Any) -> str:
    """Returns a value that is a text and neither blank nor longer than a line may be; raises ValueError otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must have a text, but has {shorten(value)}")
    if len(value) > MAX_LINE_BYTES:
        raise ValueError(f"must have texts of at most {MAX_LINE_BYTES:,} characters, but has one of {len(value):,}")
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
                f"Its columns are {shorten(list(names), 400)}."
            )
    return [name for _, name in chosen]
