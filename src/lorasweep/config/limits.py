"""Checks of single settings."""

from __future__ import annotations

import re

from lorasweep.errors import ConfigError


def require_at_least(key: str, value: float, low: float) -> None:
    """Raises ConfigError unless value >= low."""
    if not value >= low:
        raise ConfigError(f"`{key} >= {low}` must hold, but got {value!r}.")


def require_above(key: str, value: float, low: float) -> None:
    """Raises ConfigError unless value > low and it is finite."""
    if not low < value < float("inf"):
        raise ConfigError(f"`{key} > {low}` must hold, but got {value!r}.")


def require_at_most(key: str, value: float, high: float) -> None:
    """Raises ConfigError unless value <= high."""
    if not value <= high:
        raise ConfigError(f"`{key} <= {high}` must hold, but got {value!r}.")


def require_fraction(key: str, value: float) -> None:
    """Raises ConfigError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ConfigError(f"`0 <= {key} < 1` must hold, but got {value!r}.")


def check_function_name(key: str, name: str) -> None:
    """Raises ConfigError unless a name has the form `package.module:function`."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        raise ConfigError(f"`{key}` must have the form `package.module:function`, but got {name!r}.")
