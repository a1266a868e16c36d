"""The two checks that settings of several files share; `run`, `data` and `sweep` call them when a setting is made."""

from __future__ import annotations

from lorasweep.errors import ConfigError


def require_at_least(key: str, value: float, low: float) -> None:
    """Raises ConfigError unless value >= low."""
    if not value >= low:
        raise ConfigError(f"`{key} >= {low}` must hold, but got {value!r}.")


def require_fraction(key: str, value: float) -> None:
    """Raises ConfigError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ConfigError(f"`0 <= {key} < 1` must hold, but got {value!r}.")
