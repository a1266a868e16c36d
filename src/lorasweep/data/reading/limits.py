"""Refuses files that take too long to read: too many columns, too long lines, small files with large contents."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet

from lorasweep.errors import ConfigError
from lorasweep.wording import format_bytes

MAX_COLUMNS = 10_000
MAX_LINE_BYTES = 10 * 2**20
MAX_UNPACKED_RATIO = 20
"""Maximum size of a compressed file's content, divided by the size of the file. Texts have 3 to 10."""
MIN_UNPACKED_BYTES = 2**28
"""Unpacked files of at most this size are read at any ratio."""
NUM_KEY_ROWS = 2 * MAX_COLUMNS
"""Number of first rows of a jsonl file whose keys are counted, because the reader makes a column of each key."""
NUM_BATCH_ROWS = 64
"""Number of rows of a parquet file that are unpacked together to count their bytes."""
CHUNK_BYTES = 2**20
BYTE_ORDER_MARKS = b"\xff\xfe", b"\xfe\xff"
"""First bytes of text in UTF-16. It is not refused for its NULs, because the reader's error has a better remedy."""


def check_content(path: Path, *, suffix: str, separator: str = "") -> None:
    """Raises ConfigError if a file breaks one of the limits above, or has a NUL where text must be.

    Args:
        path: A text file, perhaps compressed by gzip, or a parquet file. A damaged file raises its reader's error.
        suffix: The kind of the file, such as `.csv`. A `.json` file may be one long line.
        separator: What separates the fields of a delimited file.
    """
    problem = _find_in_parquet(path) if suffix == ".parquet" else _find_in_text(path, suffix, separator)
    if problem:
        raise ConfigError(f"{str(path)!r} {problem}.")


def _get_max_bytes(path: Path) -> int:
    return max(MIN_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size)


def _find_in_parquet(path: Path) -> str | None:
    found, max_bytes = pyarrow.parquet.read_metadata(path), _get_max_bytes(path)
    if found.num_columns > MAX_COLUMNS:
        return f"must have at most {MAX_COLUMNS:,} columns, but has {found.num_columns:,}. Keep those that you need"
    num_bytes = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        # the sizes in the metadata count a value once that many rows have
        for batch in file.iter_batches(batch_size=NUM_BATCH_ROWS):
            num_bytes += batch.nbytes
            if num_bytes > max_bytes:
                return f"must unpack to at most {format_bytes(max_bytes)}, but has more. Save it in several files"
    return None


def _find_in_text(path: Path, suffix: str, separator: str) -> str | None:
    is_compressed = path.suffix.lower() == ".gz"
    max_bytes, num_bytes, line_bytes = _get_max_bytes(path), 0, 0
    with (gzip.open if is_compressed else open)(path, "rb") as file:
        is_utf16 = file.read(2) in BYTE_ORDER_MARKS
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            num_bytes += len(chunk)
            line_bytes = len(chunk) - chunk.rfind(b"\n") - 1 if b"\n" in chunk else line_bytes + len(chunk)
            if b"\0" in chunk and not is_utf16:
                return "must be text, but has a NUL character. Save it as text in UTF-8"
            if is_compressed and num_bytes > max_bytes:
                return f"must unpack to at most {format_bytes(max_bytes)}, but has more. If this is right, unpack it"
            if line_bytes > MAX_LINE_BYTES and suffix != ".json":
                limit = format_bytes(MAX_LINE_BYTES)
                return f"must have lines of at most {limit}, but one is longer. Break it, perhaps by `fold -s`"
        file.seek(0)
        if separator:
            num_columns = file.readline().count(separator.encode()) + 1
        else:
            num_columns = len(_list_keys(itertools.islice(file, NUM_KEY_ROWS))) if suffix == ".jsonl" else 0
    if num_columns > MAX_COLUMNS:
        return f"must have at most {MAX_COLUMNS:,} columns, but has more. Keep those that you need"
    return None


def _list_keys(lines: Iterator[bytes]) -> set[str]:
    keys: set[str] = set()
    for line in lines:
        with suppress(ValueError, RecursionError):  # the reader says what is wrong
            row = json.loads(line)
            keys.update(row if isinstance(row, dict) else ())
    return keys
