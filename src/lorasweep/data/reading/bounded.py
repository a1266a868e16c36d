"""Limits the size of a data file, so that a small compressed file that expands to many gigabytes fills no memory."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

from lorasweep.errors import ConfigError

MAX_FILE_BYTES = 2**31
"""Maximum size of one uncompressed file, or of the values of one parquet file. Python needs up to 6 times of it."""
MAX_FILE_VALUES = 30_000_000
"""Maximum number of values (fields, lines, elements of lists) in one file of a table. Python needs about 100 bytes and
up to 1 µs for each."""
MAX_COLUMNS = 10_000
"""Maximum number of columns of a delimited file. pandas needs 0.2 ms for each."""
VALUE_MARKS = b"\n\t,;|[{"
"""Bytes that begin or end a value in the text files of tables."""


class BoundedReader(io.RawIOBase):
    """Reads a file, and raises ConfigError once it is larger than a data file may be."""

    def __init__(self, file: BinaryIO | gzip.GzipFile, path: Path, *, counts_values: bool) -> None:
        self._file = file
        self._path = path
        self._counts_values = counts_values
        self._num_bytes = 0
        self._num_values = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._num_bytes += len(data)
        if self._counts_values:
            self._num_values += len(data) - len(data.translate(None, VALUE_MARKS))
        check_size(self._path, num_bytes=self._num_bytes, num_values=self._num_values)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_bounded(path: Path, *, counts_values: bool) -> BinaryIO:
    """Opens a file for reading, also one compressed by gzip. Reading more than a data file may have is a ConfigError.

    Args:
        path: A regular file.
        counts_values: Whether the number of values is limited too, as it is for tables.
    """
    file = gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # noqa: SIM115 (the caller closes it)
    return io.BufferedReader(BoundedReader(file, path, counts_values=counts_values), 2**20)


def check_size(path: Path, *, num_bytes: int, num_values: int = 0) -> None:
    """Raises ConfigError if a data file has more bytes, uncompressed, or more values than one file may have."""
    for number, limit, unit in (
        (num_bytes, MAX_FILE_BYTES, "bytes when it is uncompressed"),
        (num_values, MAX_FILE_VALUES, "values"),
    ):
        if number > limit:
            raise ConfigError(
                f"{str(path)!r} must have at most {limit:,} {unit}, but has {number:,} or more. Split it into several "
                "files and name them by a glob, such as `data.train='part-*.csv'`, or leave out rows and columns."
            )
