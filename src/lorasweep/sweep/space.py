"""Ranges of swept keys: from a sweep file's words to Optuna's distributions.

A list is a choice, a mapping `low`, `high` and `log` or `step` a range, in Optuna's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.config.build import nearest
from lorasweep.errors import ConfigError

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
    low, high = _bound(key, value, "low"), _bound(key, value, "high")
    log, step = bool(value.get("log", False)), value.get("step")
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
        if int(low) != low or int(high) != high:
            raise ConfigError(f"the range of `{key}` must have whole bounds, but got {low!r} and {high!r}.")
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
        count = round((distribution.high - distribution.low) / distribution.step)
        return [distribution.low + n * distribution.step for n in range(count + 1)]
    raise ConfigError(f"the range of `{key}` must be a list or have a `step` under `sampler=grid`, but is continuous.")


def describe_space(space: Space) -> dict[str, Any]:
    """Returns ranges as the sweep record holds them."""
    described: dict[str, Any] = {}
    for key, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            described[key] = list(distribution.choices)
        elif isinstance(distribution, FloatDistribution | IntDistribution):
            described[key] = {"low": distribution.low, "high": distribution.high, "log": distribution.log}
    return described


def _parse_choices(key: str, choices: list[Any]) -> CategoricalDistribution:
    if not choices:
        raise ConfigError(f"the range of `{key}` must have at least one choice, but is empty.")
    for choice in choices:
        if choice is not None and not isinstance(choice, bool | int | float | str):
            raise ConfigError(f"a choice of `{key}` must be a number, a text, true, false or null, but got {choice!r}.")
    if len(set(map(repr, choices))) < len(choices):
        raise ConfigError(f"the choices of `{key}` must differ, but got {choices!r}.")
    return CategoricalDistribution(choices)


def _bound(key: str, value: Mapping[str, Any], name: str) -> float:
    bound = value.get(name)
    if isinstance(bound, bool) or not isinstance(bound, int | float):
        raise ConfigError(f"the range of `{key}` must have a number as `{name}`, but got {bound!r}.")
    return bound
