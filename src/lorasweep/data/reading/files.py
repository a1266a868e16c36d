"""Finds the files that a setting names, and opens texts within limits of size: a file that is too large is refused."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import format_bytes, shorten, suggest_nearest

MAX_LINE_BYTES = 10 * 2**20
MAX_UNPACKED_RATIO = 20
"""Maximum size of a compressed file's content, divided by the size of the file. Texts have 3 to 10."""
MIN_UNPACKED_BYTES = 2**28
"""Unpacked files of at most this size are read at any ratio."""


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
            entries = path.parent.iterdir() if path.parent.is_dir() else ()
            # without suffixes, which make any two names similar
            names = [str(path.parent / entry.name) for entry in entries if suggest_nearest(path.stem, [entry.stem])]
            raise ConfigError(f"`{key}` must name an existing file, but got {given!r}.{suggest_nearest(given, names)}")
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
    except Exception as error:  # each reader raises its own classes
        kind = find_suffix(path)[1:] or "text"
        raise ConfigError(f"{str(path)!r} must be a {kind} file, but can't be read: {first_line(error)}.") from error


@contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a UTF-8 file, also one compressed by gzip, without its byte order mark. `newline` is that of `open`.

    Raises ConfigError in the block if the file can't be opened, and if what is read is damaged, not UTF-8 or beyond a
    limit of this module.
    """
    with refuse_unreadable(path), _CheckedBytes(path) as file:
        yield io.TextIOWrapper(io.BufferedReader(file), encoding="utf-8-sig", newline=newline)


class _CheckedBytes(io.RawIOBase):
    """The unpacked bytes of a text file. Reading raises ConfigError where they can't be a text, or break a limit."""

    def __init__(self, path: Path) -> None:
        is_compressed = path.suffix.lower() == ".gz"
        self._path, self._file = path, (gzip.open if is_compressed else open)(path, "rb")
        # a `.json` file may be one long line
        self._max_line_bytes = math.inf if find_suffix(path) == ".json" else MAX_LINE_BYTES
        self._max_bytes = get_max_bytes(path) if is_compressed else math.inf
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = self._num_lines = self._line_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed names a type of its own
        chunk = self._file.read(len(buffer))
        if problem := self._find_problem(chunk):
            raise ConfigError(f"{str(self._path)!r} {problem}.")
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _find_problem(self, chunk: bytes) -> str | None:
        try:
            self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = self._num_lines + error.object.count(b"\n", 0, error.start) + 1
            is_utf16 = self._num_bytes == 0 and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            target = self._path.with_stem(f"{self._path.stem}-utf8")
            remedy = f"iconv -f {'utf-16' if is_utf16 else 'cp1252'} -t utf-8 {self._path} > {target}"
            return f"must be in UTF-8, but line {line} is not. Convert it, perhaps by `{remedy}`"
        if b"\0" in chunk:
            return "must be text, but has a NUL character. Save it as text in UTF-8"
        self._num_bytes += len(chunk)
        self._num_lines += chunk.count(b"\n")
        end = chunk.rfind(b"\n")
        self._line_bytes = len(chunk) - end - 1 + (self._line_bytes if end < 0 else 0)
        if self._num_bytes > self._max_bytes:
            limit = format_bytes(self._max_bytes)
            return f"must unpack to at most {limit}, but has more. If this is right, unpack it"
        if self._line_bytes > self._max_line_bytes:
            limit = format_bytes(self._max_line_bytes)
            return f"must have lines of at most {limit}, but one is longer. Break it, perhaps by `fold -s`"
        return None


def get_max_bytes(path: Path) -> int:
    """Returns how large the unpacked content of a compressed file may be."""
    return max(MIN_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size)
