"""The search space of an arm: a sweep file's lists and ranges become Optuna's distributions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.config.ranges import is_number
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import nearest

RANGE_KEYS = ("low", "high", "log", "step")
Space = dict[str, BaseDistribution]
"""The distribution of each swept key."""


def parse_range(key: str, value: Any, *, is_whole: bool) -> BaseDistribution:
    """Returns the distribution of one swept key.

    Args:
        key: Dotted key, for messages.
        value: A list of choices, or a mapping with `low`, `high`, and `log` or `step`.
        is_whole: Whether the key holds whole numbers.

    Raises:
        ConfigError: The range is empty or has the wrong form.
    """
    if isinstance(value, list | tuple):
        return _parse_choices(key, list(value))
    names = value.keys() if isinstance(value, Mapping) else set()
    log = value.get("log", False) if isinstance(value, Mapping) else None
    if not {"low", "high"} <= names <= set(RANGE_KEYS) or not isinstance(log, bool):
        near = "".join(nearest(str(name), RANGE_KEYS) for name in names if name not in RANGE_KEYS)
        raise ConfigError(
            f"the range of `{key}` must be a list of choices, or a mapping with `low`, `high`, and perhaps `log: true` "
            f"or `step`, but got {value!r}.{near}"
        )
    numbers = {name: number for name, number in value.items() if name != "log" and (name, number) != ("step", None)}
    for name, number in numbers.items():
        # Optuna computes the size of a range of whole numbers in 64 bits
        if not is_number(number) or (is_whole and (number != int(number) or abs(number) >= 2**62)):
            kind = "a whole number" if is_whole else "a number"
            raise ConfigError(f"the range of `{key}` must have {kind} as `{name}`, but got {number!r}.")
    arguments = {name: int(number) if is_whole else number for name, number in numbers.items()}
    try:
        with warnings.catch_warnings():
            # Optuna would lower `high` to the last step and warn. The user must write the values that are tried.
            warnings.simplefilter("error", UserWarning)
            return (IntDistribution if is_whole else FloatDistribution)(**arguments, log=log)
    except (ValueError, ArithmeticError, UserWarning) as error:  # Optuna's message names the broken rule
        raise ConfigError(
            f"the range of `{key}` must be one that Optuna accepts, but got {dict(value)!r}: {first_line(error)}."
        ) from error


def list_corner_values(distribution: BaseDistribution) -> list[Any]:
    """Returns every choice of a list, or both ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


def describe_space(space: Space) -> dict[str, Any]:
    """Returns a space in the form of a sweep file, for the sweep's record."""
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
        raise ConfigError(
            f"the range of `{key}` must have at least one choice, and no choice twice, but got {choices!r}."
        )
    return CategoricalDistribution(choices)
