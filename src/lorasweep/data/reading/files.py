"""Finds the files that a setting names, and reads texts. Next: `tables` and `documents`."""

from __future__ import annotations

import glob
from pathlib import Path

from lorasweep.errors import ConfigError
from lorasweep.wording import nearest


def find_files(given: str, *, key: str) -> list[Path]:
    """Returns the files that a path or glob names, sorted by name; a folder is returned itself.

    Args:
        given: The setting's value.
        key: The setting's dotted key, for messages.

    Raises:
        ConfigError: There is none.
    """
    path = Path(given).expanduser()
    if path.exists():
        return [path]  # before it is tried as a glob: `odd[1].csv` is a file's name
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        names = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"`{key}` must name an existing file, but got {given!r}.{nearest(given, names)}")
    return found


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file with its line ends as they are, without a byte order mark.

    Raises:
        ConfigError: The file can't be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{str(path)!r} must be a text file in UTF-8, but {error}. Save it as UTF-8, or leave it out."
        ) from error
