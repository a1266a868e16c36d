"""Reads and writes records as JSON. Files have no secrets and are written atomically. Reading runs no code."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from lorasweep.config.redaction import redact
from lorasweep.disk import open_inside, suggest_path, write_atomically
from lorasweep.errors import RecordError
from lorasweep.wording import shorten

VERSION: Literal[1] = 1
"""Version of the format. Records of another version are refused."""
MAX_NUMBER = 1e100
"""Numbers with a larger absolute value count as infinite, because squares of their differences could overflow."""


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a value is a finite number, and not a boolean."""
    # The last comparison is false for NaN.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _check_number(value: Any) -> Any:
    if isinstance(value, int | float) and not is_number(value):
        raise ValueError("must be finite")
    return math.nan if value is None else value


Number = Annotated[int | float, BeforeValidator(_check_number)]
"""A float of a record. NaN and infinity are written as null, because JSON has neither, and null is read as NaN."""
Finite = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Count = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""A whole number of a record, which fits into the 64 bits that numpy and pandas have."""

FOLDER_NAME = r"[\w-][\w.-]*"
"""Regular expression of a name from which a path is built: one component of a path, and not `.` or `..`."""
FolderName = Annotated[str, Field(pattern=f"^{FOLDER_NAME}$", max_length=200)]

T = TypeVar("T")


def write_record(record: Any, folder: Path) -> None:
    """Writes `run.json` or `sweep.json` without secrets.

    Lists of rows have one line per row, because indented rows would slow down a sweep of 10,000 trials.
    """
    entries = []
    for key, value in _as_mapping(record).items():
        if isinstance(value, list) and value and (is_dataclass(value[0]) or isinstance(value[0], dict)):
            text = "[\n  " + ",\n  ".join(map(dump_row, value)) + "\n ]"
        else:
            text = json.dumps(_finite(value), indent=1).replace("\n", "\n ")
        entries.append(f" {json.dumps(key)}: {text}")
    text = redact("{\n" + ",\n".join(entries) + "\n}\n")
    write_atomically(folder / f"{record.format.removeprefix('lorasweep.')}.json", text)


def read_json(kind: type[T], path: Path) -> T:
    """Reads a record of a dataclass and ignores other keys. Raises RecordError if the file is no such record."""
    if not path.is_file():
        folder, needed = path.parent, f"contain {path.name}" if path.parent.exists() else "exist"
        near = suggest_path(folder, Path("outputs"))
        raise RecordError(f"a {path.stem}'s folder must {needed}, but {str(folder)!r} does not.{near}")
    try:
        with open_inside(path.parent, path) as file:
            record: T = _adapter(kind).validate_json(file.read(), strict=True)  # type: ignore[arg-type]
        return record
    except PermissionError as error:
        raise RecordError(f"{str(path)!r} must be readable, but can't be read: {error.strerror}.") from error
    except (OSError, ValidationError) as error:
        problem = _describe(error) if isinstance(error, ValidationError) else str(error)
        raise RecordError(
            f"{str(path)!r} must be a whole record of this version of lorasweep, but is damaged or has another "
            f"version: {problem}. Restore the file."
        ) from error


@cache  # building it takes as long as reading thousands of rows
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _describe(error: ValidationError) -> str:
    """Returns a clause on the first value that is wrong: `number: Input should be a valid integer, got '3'`."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    got = "" if first["type"] in ("json_invalid", "missing") else f", got {shorten(first['input'])}"
    return f"{place}: {first['msg']}{got}" if place else first["msg"]


def dump_row(row: Any) -> str:
    """Returns a row or a mapping as one line of JSON. NaN and infinity become null."""
    plain = row if isinstance(row, dict) else _as_mapping(row)
    try:
        return json.dumps(plain, allow_nan=False, default=_as_mapping)
    except ValueError:
        return json.dumps(_finite(plain))


def _as_mapping(row: Any) -> dict[str, Any]:
    return {each.name: getattr(row, each.name) for each in fields(row) if each.init}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return _finite(_as_mapping(value)) if is_dataclass(value) else value
