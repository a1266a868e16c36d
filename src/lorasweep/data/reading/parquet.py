"""Reads parquet files, whose columns are measured before they are turned into Python's values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from lorasweep.data.reading.bounded import check_size

MAX_PREFIX_ROWS = 16
"""Rows of texts stored as prefix and rest that are decoded at once: each may be as long as the whole stored column."""


def read_columns(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Returns columns by name.

    Raises:
        ConfigError: The columns have more bytes or values than one file may have.
        OSError, ValueError, OverflowError, pyarrow.ArrowException: The file can't be read, or a date is out of range.
    """
    _check_columns(path, names)
    with pyarrow.parquet.ParquetFile(path) as file:
        table = file.read(columns=[*names])
    try:
        columns: dict[str, list[Any]] = table.to_pydict()
    except KeyError as error:
        raise ValueError(f"its time zone {error} is unknown") from error
    return columns


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """Raises ConfigError if columns have too many bytes or values, as the file states it or as it really is.

    A text of a megabyte that is stored once may be the value of every row. So texts are read with repeated values
    stored once, and the lengths of all rows are added up.
    """
    with pyarrow.parquet.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema
    chosen = [
        index
        for index in range(metadata.num_columns)
        if any(f"{schema.column(index).path}.".startswith(f"{name}.") for name in names)
    ]
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    chunks = [(index, group.column(index)) for group in groups for index in chosen]
    fixed_bytes = [
        group.column(index).num_values * max(schema.column(index).length, 0) for group in groups for index in chosen
    ]
    check_size(
        path,
        num_bytes=max(sum(chunk.total_uncompressed_size for _, chunk in chunks), sum(fixed_bytes)),
        num_values=max(metadata.num_rows * len(names), sum(chunk.num_values for _, chunk in chunks)),
    )
    texts = {
        schema.column(index).path
        for index in chosen
        if schema.column(index).physical_type == "BYTE_ARRAY" and schema.column(index).logical_type.type != "DECIMAL"
    }
    with_prefixes = {chunk.path_in_schema for _, chunk in chunks if "DELTA_BYTE_ARRAY" in chunk.encodings} & texts
    num_bytes = 0
    for table in _iterate_tables(path, repeated=sorted(texts - with_prefixes), with_prefixes=sorted(with_prefixes)):
        num_bytes += sum(map(measure_values, table.columns))
        check_size(path, num_bytes=num_bytes)


def _iterate_tables(path: Path, *, repeated: Sequence[str], with_prefixes: Sequence[str]) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path, read_dictionary=[*repeated]) as file:
        if repeated:
            yield from (file.read_row_group(group, columns=[*repeated]) for group in range(file.num_row_groups))
        if with_prefixes:
            yield from file.iter_batches(MAX_PREFIX_ROWS, columns=[*with_prefixes])


def measure_values(column: Any) -> int:
    """Returns the bytes of the values of an Arrow array, with a value that is repeated counted each time."""
    if isinstance(column, pyarrow.ChunkedArray):
        return sum(map(measure_values, column.chunks))
    if isinstance(column, pyarrow.DictionaryArray):
        lengths = pyarrow.compute.binary_length(column.dictionary).take(column.indices)
        return pyarrow.compute.sum(lengths.cast(pyarrow.int64())).as_py() or 0
    if isinstance(column, pyarrow.StructArray):
        return sum(map(measure_values, column.flatten()))
    if isinstance(column, pyarrow.MapArray):
        return measure_values(column.keys) + measure_values(column.items)
    if isinstance(column, pyarrow.ListArray | pyarrow.LargeListArray | pyarrow.FixedSizeListArray):
        return measure_values(column.flatten())
    if isinstance(column, pyarrow.ExtensionArray):
        return measure_values(column.storage)
    return int(column.nbytes)
