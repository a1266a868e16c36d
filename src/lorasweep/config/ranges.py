"""The ends and the width of a searched range, as a sweep file and a record write it.

A list is a choice, a mapping with `low`, `high` and perhaps `log` a range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

MAX_NUMBER = 1e100
"""The largest absolute value that counts as a number: differences and squares of larger ones would be infinite."""
MAX_WIDTH_DIFFERENCE_DECADES = 0.5
"""Learning-rate ranges count as equally wide up to this difference: the step of a coarse grid (1, 3, 10)."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The smallest and the largest value of a range of numbers."""

    low: float
    high: float
    is_log: bool


def find_bounds(searched: Any) -> Bounds | None:
    """Returns the ends of a range; None if it has fewer than two values or one that is not a number.

    Args:
        searched: A list of choices in any order, or a mapping with `low`, `high` and perhaps `log`.
    """
    is_mapping = isinstance(searched, dict)
    values = [searched.get("low"), searched.get("high")] if is_mapping else searched
    if not isinstance(values, list) or not all(map(is_number, values)) or len(set(values)) < 2:
        return None
    low, high = min(values), max(values)
    return Bounds(low=low, high=high, is_log=is_mapping and searched.get("log") is True and low > 0)


def width_in_decades(searched: Any) -> float | None:
    """Returns log10(high / low) of a range; None if it has fewer than two values or one that is not positive."""
    bounds = find_bounds(searched)
    return math.log10(bounds.high) - math.log10(bounds.low) if bounds and bounds.low > 0 else None


def is_number(value: Any) -> bool:
    """Returns whether a value, of a record perhaps, is a number that can be computed with: finite, and no boolean."""
    # NaN compares false
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
