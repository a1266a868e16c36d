"""Finds the files that a setting names and reads their lines, checked. Next: `tables` and `documents`."""

from __future__ import annotations

import codecs
import glob
from collections.abc import Iterator
from pathlib import Path

from lorasweep.errors import ConfigError
from lorasweep.wording import nearest

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is refused before it is read whole: it is a file of another kind, and would fill the memory."""

ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""How a file in another encoding than UTF-8 begins."""


def find_files(given: str, *, key: str) -> list[Path]:
    """Returns the files that a path or glob names, sorted; of a folder itself, nothing below it.

    Args:
        given: What the setting says.
        key: The setting, for messages.

    Raises:
        ConfigError: There is none.
    """
    path = Path(given).expanduser()
    try:
        if path.exists():
            return [path]
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    except (OSError, ValueError) as error:  # a name that no file can have: too long, or with a NUL byte
        raise ConfigError(f"`{key}` must name a file, but {given!r} can't be one: {error}.") from error
    if not found:
        raise ConfigError(f"`{key}` must name a file that is there, but got {given!r}.{_nearest_file(path)}")
    return found


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r}."
    names = [entry.name for entry in path.parent.iterdir()]
    return nearest(path.name, names)


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file with their ends, and never holds more than one. A byte order mark is left out.

    Raises:
        ConfigError: The file can't be read, or a line is not UTF-8, has a NUL byte or more than `MAX_LINE_BYTES`.
    """
    if not path.is_file():
        raise ConfigError(f"{str(path)!r} must be a file, but is a folder or something else. Name a file or a glob.")
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield _decode(data, place=f"line {number} of {str(path)!r}", is_first=number == 1)
    except OSError as error:
        raise ConfigError(f"{str(path)!r} must be a file that can be read, but: {error.strerror}.") from error


def _decode(data: bytes, *, place: str, is_first: bool) -> str:
    if is_first:
        _check_encoding(data, place=place)
        data = data.removeprefix(codecs.BOM_UTF8)
    if len(data) > MAX_LINE_BYTES:
        raise ConfigError(
            f"{place} must have at most {MAX_LINE_BYTES // 2**20} MB, but has more. Is it a file of another kind?"
        )
    if b"\0" in data:
        raise ConfigError(
            f"{place} must be text in UTF-8, but has a NUL byte. Save it as UTF-8 or, if it is no text, leave it out."
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = f"its byte {error.start + 1} is 0x{data[error.start]:02x}"
        raise ConfigError(
            f"{place} must be text in UTF-8, but {byte}. Save it as UTF-8 or, if it is no text, leave it out."
        ) from error


def _check_encoding(data: bytes, *, place: str) -> None:
    for mark, encoding in ENCODINGS.items():
        if data.startswith(mark):
            raise ConfigError(f"{place} must be text in UTF-8, but is {encoding}. Save the file as UTF-8.")
