"""The search space of an arm: a sweep file's lists and ranges become Optuna's distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import nearest

RANGE_KEYS = ("low", "high", "log", "step")
Space = dict[str, BaseDistribution]
"""The distribution of each searched key."""


def parse_range(key: str, value: Any, *, whole: bool) -> BaseDistribution:
    """Returns the distribution of one searched key.

    Args:
        key: Dotted key, for messages.
        value: A list of choices, or a mapping with `low`, `high`, and `log` or `step`.
        whole: Whether the key holds whole numbers.

    Raises:
        ConfigError: The range is empty or has the wrong form.
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
                f"the range of `{key}` may have the keys {', '.join(RANGE_KEYS)}, but got {name!r}."
                f"{nearest(str(name), RANGE_KEYS)}"
            )
    low, high = (_read_number(key, value.get(name), name, whole=whole) for name in ("low", "high"))
    step = None if value.get("step") is None else _read_number(key, value["step"], "step", whole=whole)
    log = value.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"`log` must be true or false for the range of `{key}`, but got {log!r}.")
    if not low < high:
        raise ConfigError(f"`low < high` must hold for the range of `{key}`, but got {low!r} and {high!r}.")
    # Optuna lowers `high` to the last step and warns; a sweep file should name the values that are tried
    if step and (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise ConfigError(f"`step` must divide `high - low` for the range of `{key}`, but got {dict(value)!r}.")
    try:
        if whole:
            return IntDistribution(int(low), int(high), log=log, step=1 if step is None else int(step))
        return FloatDistribution(low, high, log=log, step=step)
    except ValueError as error:  # Optuna names the rule that `log` or `step` breaks
        raise ConfigError(
            f"the range of `{key}` must be one that Optuna accepts, but got {dict(value)!r}: {first_line(error)}"
        ) from error


def corner_values(distribution: BaseDistribution) -> list[Any]:
    """Returns the values of a range that are checked before the first trial: every choice, or both ends."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def grid_values(key: str, distribution: BaseDistribution) -> Sequence[Any]:
    """Returns every value of a range, for `sampler=grid`.

    Raises:
        ConfigError: The range is continuous.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return range(distribution.low, distribution.high + 1, distribution.step)
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        low, high, step = (Decimal(str(n)) for n in (distribution.low, distribution.high, distribution.step))
        return [float(low + n * step) for n in range(int((high - low) / step) + 1)]  # 0.3, not 0.30000000000000004
    raise ConfigError(f"the range of `{key}` must be a list or have a `step` under `sampler=grid`, but is continuous.")


def describe_space(space: Space) -> dict[str, Any]:
    """Returns a space as the sweep's record has it, in the form of a sweep file."""
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
    for choice in choices:
        plain = choice is None or isinstance(choice, bool | int | float | str)
        if not plain or (isinstance(choice, float) and not math.isfinite(choice)):
            raise ConfigError(f"a choice of `{key}` must be a number, a text, true, false or null, but got {choice!r}.")
    if not choices or len(set(map(repr, choices))) < len(choices):
        raise ConfigError(f"the range of `{key}` must have at least one choice and none twice, but got {choices!r}.")
    return CategoricalDistribution(choices)


def _read_number(key: str, number: Any, name: str, *, whole: bool) -> float:
    is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    if not is_number or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"the range of `{key}` must have {kind} as `{name}`, but got {number!r}.")
    return float(number) if not whole else int(number)
