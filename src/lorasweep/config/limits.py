"""Types of settings with limits: `max_steps: Positive` is checked when `build` creates the settings."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Annotated, Any

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

Positive = Annotated[int, (">=", 1)]
NonNegative = Annotated[int, (">=", 0)]
AtLeastTwo = Annotated[int, (">=", 2)]
Rank = Annotated[int, (">=", 1), ("<", 2**31)]  # so that the size of a layer's A and B fits 64 bits
Seed = Annotated[int, (">=", 0), ("<", 2**32)]
Fraction = Annotated[float, (">=", 0), ("<", 1)]
PositiveFloat = Annotated[float, (">", 0), ("<", math.inf)]
NonNegativeFloat = Annotated[float, (">=", 0), ("<", math.inf)]
