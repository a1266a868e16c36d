"""Finds the files that a setting names, and opens texts."""

from __future__ import annotations

import glob
import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lorasweep.disk import suggest_path
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import shorten


def find_files(given: str, *, key: str) -> list[Path]:
    """Returns the sorted files of a path or glob, or the folder that it names. Raises ConfigError if none exists."""
    try:
        path = Path(given).expanduser()
        if path.exists():  # checked before the glob, because `odd[1].csv` may be the name of a file
            return [path]
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise ConfigError(f"`{key}` must name an existing file, but got {given!r}.{suggest_path(path)}")
        return found
    except (OSError, RuntimeError) as error:  # a folder is closed to this user, a name is too long, ~USER is unknown
        raise ConfigError(
            f"`{key}` must name an existing file, but got {shorten(given, 400)}: {first_line(error)}."
        ) from error


def find_texts(given: str, *, key: str) -> tuple[list[Path], Path]:
    """Returns the files that a setting names, and the folder to which the names of documents are relative.

    A folder stands for all files below it, except hidden ones. Raises ConfigError if no such file exists.
    """
    files = find_files(given, key=key)
    if not files[0].is_dir():
        return files, Path(os.path.commonpath([file.parent.absolute() for file in files]))
    folder = files[0]
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [folder / name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not files:
        raise ConfigError(f"`{key}` must name a folder with files, but {given!r} has none.")
    return files, folder


def find_suffix(path: Path) -> str:
    """Returns the suffix of a file's name in lower case, such as `.csv` for `a.csv` and `A.CSV.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextmanager
def refuse_unreadable(path: Path) -> Iterator[None]:
    """Raises ConfigError instead of the errors that libraries raise for a file that is damaged or of another kind."""
    try:
        yield
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{str(path)!r} must be in UTF-8, but is not: {first_line(error)}. Convert it, perhaps by "
            f"`iconv -f cp1252 -t utf-8 {path} > {path.with_stem(f'{path.stem}-utf8')}`."
        ) from error
    except Exception as error:  # each reader raises its own classes
        kind = find_suffix(path)[1:] or "text"
        raise ConfigError(f"{str(path)!r} must be a {kind} file, but can't be read: {first_line(error)}.") from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a UTF-8 file, also one compressed by gzip, without its byte order mark.

    Raises ConfigError in the block if the file can't be opened, is damaged or is not UTF-8.
    """
    is_compressed = path.suffix.lower() == ".gz"
    with refuse_unreadable(path), (gzip.open if is_compressed else open)(path, "rt", encoding="utf-8-sig") as file:
        yield file
