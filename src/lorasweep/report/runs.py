"""Reads one run's folder for the report: its record and validation curve. What can't be read is a sentence, no error.

Comes after `record`, before `tables` and `reruns`.
"""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from lorasweep.errors import RecordError
from lorasweep.record import RunRecord, read_run, read_steps

Curve = tuple[tuple[int, float], ...]
"""Validation values of the sweep's metric over training: pairs of step and value, by step."""

KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "dict": dict,
    "list": list,
}


def misfits(row: Any) -> list[str]:
    """Returns the names of a record's fields whose values are not of the kind that the field declares."""
    known = [f for f in fields(row) if not ("None" in str(f.type) and getattr(row, f.name) is None)]
    declared = [(f.name, KINDS.get(str(f.type).removesuffix(" | None").split("[", 1)[0])) for f in known]
    return [name for name, kind in declared if kind and not _is_kind(getattr(row, name), kind)]


def read_usable_run(sweep: Path, run: str) -> tuple[RunRecord | None, str | None]:
    """Returns a run's record, or None and the sentence that says why it can't be used."""
    if not (sweep / run).resolve().is_relative_to(sweep.resolve()):
        return None, f"The run `{run}` is not read: its folder lies outside the sweep's."
    try:
        record = read_run(sweep / run)
    except (RecordError, OSError) as error:
        return None, f"The run `{run}` can't be read: {error}"
    if wrong := misfits(record):
        return None, f"The run `{run}` can't be read: `{wrong[0]}` is not of its declared type."
    return record, None


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
    """Returns a run's finite value of the sweep's metric: the listed one, else the run's own; None where neither is.

    Args:
        listed: What the sweep's record says.
        run: The run's record. One that is scored by another metric makes what is listed worthless.
        metric: The sweep's metric.
        part: Where the run has it: `best` on validation data, `test` on test data.
    """
    value = finite_number(listed) if run is None or run.metric == metric else None
    return finite_number(getattr(run, part).get(metric)) if value is None and run else value


def finite_number(value: Any) -> float | None:
    """Returns a value that is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _is_kind(value: Any, kind: type | tuple[type, ...]) -> bool:
    # JSON's true is no number
    return isinstance(value, kind) and not isinstance(value, bool)
