"""Ranges of swept keys: from a sweep file's words to Optuna's distributions.

A list is a choice, a mapping `low`, `high` and `log` or `step` a range, in Optuna's words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.errors import ConfigError
from lorasweep.wording import nearest

MAX_CHOICES = 1000
"""Of one key: each is checked before the first trial."""
MAX_VALUES = 10**9
"""Of a range with a step."""
LARGEST = 10**15
"""Whole numbers up to here are exact as floats, as samplers compute."""
RANGE_KEYS = {"low", "high", "log", "step"}
Space = dict[str, BaseDistribution]


def parse_range(key: str, value: Any, *, whole: bool) -> BaseDistribution:
    """Returns one swept key's distribution.

    Args:
        key: Dotted key, for messages.
        value: A list of choices or a mapping.
        whole: Whether the key holds whole numbers.

    Raises:
        ConfigError: The range is empty or not understood.
    """
    if isinstance(value, list | tuple):
        return _parse_choices(key, list(value))
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"the range of `{key}` must be a list of choices or a mapping with `low` and `high`, but got {value!r}."
        )
    for name in value:
        if name not in RANGE_KEYS:
            raise ConfigError(
                f"the range of `{key}` must have keys out of {', '.join(sorted(RANGE_KEYS))}, but got {name!r}."
                f"{nearest(str(name), RANGE_KEYS)}"
            )
    low, high = _number(key, value, "low"), _number(key, value, "high")
    log, step = value.get("log", False), None if value.get("step") is None else _number(key, value, "step")
    if not isinstance(log, bool):
        raise ConfigError(f"`log` must be true or false for the range of `{key}`, but got {log!r}.")
    if not low < high:
        raise ConfigError(
            f"`low < high` must hold for the range of `{key}`, but got {low!r} and {high!r}: it is empty."
        )
    if log and not low > 0:
        raise ConfigError(f"`low > 0` must hold for the logarithmic range of `{key}`, but got {low!r}.")
    if log and step is not None:
        raise ConfigError(f"the range of `{key}` must have `log` or `step`, but got both. Leave one out.")
    if step is not None and not 0 < step <= high - low:
        raise ConfigError(f"`0 < step <= high - low` must hold for the range of `{key}`, but got {step!r}.")
    if whole:
        _require_whole(key, low, high, step)
    if step is not None and (high - low) / step >= MAX_VALUES:
        raise ConfigError(f"the range of `{key}` must have fewer than {MAX_VALUES:,} values, but `step` is {step!r}.")
    if step is not None and (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise ConfigError(
            f"`step` must divide `high - low` for the range of `{key}`, but got {step!r} for {low!r} to {high!r}."
        )
    if whole:
        return IntDistribution(int(low), int(high), log=log, step=int(step or 1))
    return FloatDistribution(float(low), float(high), log=log, step=step)


def corner_values(distribution: BaseDistribution) -> list[Any]:
    """Returns the values at which a range is checked before the first trial: every choice, or both ends."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return [distribution.low, distribution.high]
    raise TypeError(distribution)


def grid_values(key: str, distribution: BaseDistribution) -> list[Any]:
    """Returns the values of a range for a grid.

    Raises:
        ConfigError: The range is continuous.
    """
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        low, high, step = (Decimal(str(n)) for n in (distribution.low, distribution.high, distribution.step))
        return [float(low + n * step) for n in range(int((high - low) / step) + 1)]  # 0.3, not 0.30000000000000004
    raise ConfigError(f"the range of `{key}` must be a list or have a `step` under `sampler=grid`, but is continuous.")


def count_values(key: str, distribution: BaseDistribution) -> int:
    """Returns how many values a range has for a grid; arguments and errors as in `grid_values`."""
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return round((distribution.high - distribution.low) / distribution.step) + 1
    return len(grid_values(key, distribution))


def describe_space(space: Space) -> dict[str, Any]:
    """Returns ranges as the sweep record holds them."""
    described: dict[str, Any] = {}
    for key, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            described[key] = list(distribution.choices)
        elif isinstance(distribution, FloatDistribution | IntDistribution):
            described[key] = {"low": distribution.low, "high": distribution.high, "log": distribution.log}
            if distribution.step != (1 if isinstance(distribution, IntDistribution) else None):
                described[key]["step"] = distribution.step
    return described


def _parse_choices(key: str, choices: list[Any]) -> CategoricalDistribution:
    if not choices:
        raise ConfigError(f"the range of `{key}` must have at least one choice, but is empty.")
    if len(choices) > MAX_CHOICES:
        raise ConfigError(
            f"the range of `{key}` must have at most {MAX_CHOICES} choices, but has {len(choices)}. "
            "Write `{low: ..., high: ...}`."
        )
    for choice in choices:
        plain = choice is None or isinstance(choice, bool | int | float | str)
        if not plain or (isinstance(choice, float) and not math.isfinite(choice)):
            raise ConfigError(f"a choice of `{key}` must be a number, a text, true, false or null, but got {choice!r}.")
    if len(set(map(repr, choices))) < len(choices):
        raise ConfigError(f"the choices of `{key}` must differ, but got {choices!r}.")
    return CategoricalDistribution(choices)


def _number(key: str, value: Mapping[str, Any], name: str) -> float:
    number = value.get(name)
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < math.inf:
        raise ConfigError(f"the range of `{key}` must have a number as `{name}`, but got {number!r}.")
    if abs(number) > LARGEST:
        raise ConfigError(f"the range of `{key}` must have a `{name}` of at most {LARGEST:g}, but got {number!r:.30}.")
    return number


def _require_whole(key: str, low: float, high: float, step: float | None) -> None:
    if int(low) != low or int(high) != high:
        raise ConfigError(f"the range of `{key}` must have whole bounds, but got {low!r} and {high!r}.")
    if step is not None and int(step) != step:
        raise ConfigError(f"the range of `{key}` must have a whole `step`, but got {step!r}.")
