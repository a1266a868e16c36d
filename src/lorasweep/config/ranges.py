"""The bounds and the width of a swept range, which a sweep file and a record write as a list or a mapping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MAX_NUMBER = 1e100
"""Numbers with a larger absolute value are ignored, because their differences and squares would be infinite."""
MAX_WIDTH_DIFFERENCE_DECADES = 0.5
"""Two learning-rate ranges with a smaller difference in width count as equally wide. It is a step of a coarse grid
(1, 3, 10)."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The smallest and the largest value of a range of numbers."""

    low: float
    high: float
    is_log: bool


def find_bounds(swept: Any) -> Bounds | None:
    """Returns the bounds of choices or of a mapping with `low`, `high` and perhaps `log`.

    Returns None if a value is not a number or if there are no two different numbers.
    """
    is_mapping = isinstance(swept, dict)
    values = [swept.get("low"), swept.get("high")] if is_mapping else swept
    if not isinstance(values, list) or not all(map(is_number, values)) or len(set(values)) < 2:
        return None
    low, high = min(values), max(values)
    return Bounds(low=low, high=high, is_log=is_mapping and swept.get("log") is True and low > 0)


def width_in_decades(swept: Any) -> float | None:
    """Returns log10(high / low), or None if a value is not positive or the range has no bounds."""
    bounds = find_bounds(swept)
    return math.log10(bounds.high) - math.log10(bounds.low) if bounds and bounds.low > 0 else None


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number, and not a boolean."""
    # The last comparison is false for NaN.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
