"""Reads one run's folder for the report: its record and its validation curve. Comes before `tables` and `reruns`.

A file that can't be read gives a sentence in place of an error.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lorasweep.config.ranges import is_number
from lorasweep.errors import RecordError
from lorasweep.record import ArmRow, ConfirmRow, RunRecord, SweepRecord, TrialRow, folder_of_run, read_run, read_steps
from lorasweep.wording import made_visible

Curve = tuple[tuple[int, float], ...]
"""Validation values of the sweep's metric: pairs of step and value, by step."""

KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "dict": dict,
    "list": list,
}
"""Types of a record's fields by the name that the field declares."""
AS_THEY_ARE = ("run", "definition", "arms", "trials", "confirm")
"""Fields that `as_shown` leaves alone: a folder's path, the definition that `--resume` reads, and lists of rows."""
Row = TypeVar("Row", RunRecord, SweepRecord, ArmRow, TrialRow, ConfirmRow)


def misfits(row: Any) -> list[str]:
    """Returns the names of a record's fields whose values are not of the declared type."""
    known = [f for f in fields(row) if not ("None" in str(f.type) and getattr(row, f.name) is None)]
    declared = [(f.name, KINDS.get(str(f.type).removesuffix(" | None").split("[", 1)[0])) for f in known]
    return [name for name, kind in declared if kind and not _is_kind(getattr(row, name), kind)]


def as_shown(row: Row) -> Row:
    """Returns a record, or a row of one, with invisible characters in its texts escaped: they may come from anyone.

    The run's folder stays as it is, and a reason keeps its line ends.
    """
    shown = {
        f.name: made_visible(getattr(row, f.name), keep="\n\t" if f.name == "reason" else "")
        for f in fields(row)
        if f.name not in AS_THEY_ARE
    }
    return replace(row, **shown)


def read_usable_run(sweep: Path, run: str) -> tuple[RunRecord | None, str | None]:
    """Returns a run's record and None, or None and a sentence that says why the record can't be used."""
    try:
        folder_of_run(sweep, run)
    except RecordError:
        return None, f"The run `{run}` is not read: its folder lies outside the sweep's."
    try:
        record = read_run(sweep / run)
    except (RecordError, OSError) as error:
        return None, f"The run `{run}` can't be read: {error}"
    if wrong := misfits(record):
        return None, f"The run `{run}` can't be read: `{wrong[0]}` is not of its declared type."
    return as_shown(record), None


def read_curve(run: Path, metric: str) -> Curve:
    """Returns a run's validation values of a metric; empty where none can be read."""
    values: dict[int, float] = {}
    try:
        for row in read_steps(run, having='"validation"'):
            validation = row.get("validation") if isinstance(row, dict) else None
            value = finite_number(validation.get(metric)) if isinstance(validation, dict) else None
            if value is not None and isinstance(row.get("step"), int):
                # a resumed run writes the steps after its checkpoint again: the later row counts
                values[row["step"]] = value
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(sorted(values.items()))


def value_of(
    listed: Any, run: RunRecord | None, metric: str, *, part: Literal["best", "test"] = "best"
) -> float | None:
    """Returns a run's value of the sweep's metric: the listed one, else the run's own; None if neither is finite.

    Args:
        listed: The value in the sweep's record. It is not used if the run is scored by another metric.
        run: The run's record.
        metric: The sweep's metric.
        part: Which values of the run to read: `best` on validation data, `test` on test data.
    """
    value = finite_number(listed) if run is None or run.metric == metric else None
    return finite_number(getattr(run, part).get(metric)) if value is None and run else value


def finite_number(value: Any) -> float | None:
    """Returns a value that is a number and can be computed with, else None."""
    return value if is_number(value) else None


def _is_kind(value: Any, kind: type | tuple[type, ...]) -> bool:
    # JSON's true is no number
    return isinstance(value, kind) and not isinstance(value, bool)
