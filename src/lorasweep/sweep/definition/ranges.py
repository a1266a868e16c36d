"""The range of a swept key: its choices or bounds, its ends, and its form in a sweep file, a point and Optuna."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.config.run import DECLARED_TYPES
from lorasweep.config.sweep import MAX_CHOICES
from lorasweep.errors import ConfigError, first_line
from lorasweep.record import is_number

BOUNDS = ("low", "high", "log", "step")


def _check_choices(key: str, choices: Sequence[Any]) -> Sequence[Any]:
    if len(choices) > MAX_CHOICES:
        raise ConfigError(
            f"the range of `{key}` must have at most {MAX_CHOICES:,} choices, but has {len(choices):,}. Write a range "
            "with `low` and `high`."
        )
    for choice in choices:
        plain = choice is None or isinstance(choice, bool | int | float | str)
        if not plain or (isinstance(choice, float) and not math.isfinite(choice)):
            raise ConfigError(f"a choice of `{key}` must be a number, a text, true, false or null, but got {choice!r}.")
    if not choices or len(set(map(repr, choices))) < len(choices):
        raise ConfigError(
            f"the range of `{key}` must have at least one choice, and no choice twice, but got {list(choices)!r}."
        )
    return choices


@dataclass(frozen=True, kw_only=True)
class Range:
    """The values among which the search chooses for a setting: a list of choices, or numbers between two bounds."""

    choices: Sequence[Any] = ()
    """Empty for numbers between bounds."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Whether numbers are searched on a log scale."""
    step: float | None = None
    """Distance between two numbers: None for all numbers between the bounds, 1 for whole numbers by default."""
    is_whole: bool = False
    """Whether the numbers are whole."""

    def __post_init__(self) -> None:
        kind, step = int if self.is_whole else float, 1 if self.is_whole and self.step is None else self.step
        object.__setattr__(self, "choices", tuple(self.choices))
        object.__setattr__(self, "low", kind(self.low))
        object.__setattr__(self, "high", kind(self.high))
        object.__setattr__(self, "step", None if step is None else kind(step))

    @classmethod
    def parse(cls, key: str, value: Any) -> Range:
        """Returns the range of a setting from a list of choices, or from `low`, `high`, and `log` or `step`.

        It has whole numbers if the declared type of the setting is `int`. An argument of another package's class has no
        declared type, and has whole numbers if its bounds are.

        Raises:
            ConfigError: The range is empty or has the wrong form.
        """
        if isinstance(value, list | tuple):
            return cls(choices=_check_choices(key, value))
        names = value.keys() if isinstance(value, Mapping) else set()
        log = value.get("log", False) if isinstance(value, Mapping) else None
        if not {"low", "high"} <= names <= set(BOUNDS) or not isinstance(log, bool):
            raise ConfigError(
                f"the range of `{key}` must be a list of choices, or a mapping with `low`, `high`, and perhaps "
                f"`log: true` or `step`, but got {value!r}."
            )
        declared = DECLARED_TYPES.get(key) or set(map(type, value.values())) - {bool}
        is_whole = int in declared and float not in declared
        numbers = {name: number for name, number in value.items() if name != "log" and (name, number) != ("step", None)}
        for name, number in numbers.items():
            # Optuna computes the size of a range of whole numbers in 64 bits
            if not is_number(number) or (is_whole and (number != int(number) or abs(number) >= 2**62)):
                kind = "a whole number" if is_whole else "a number"
                raise ConfigError(f"the range of `{key}` must have {kind} as `{name}`, but got {number!r}.")
        if numbers["low"] > numbers["high"]:
            raise ConfigError(
                f"the range of `{key}` must have `low <= high`, but got {numbers['low']!r} and {numbers['high']!r}. "
                "Swap them."
            )
        try:
            with warnings.catch_warnings():
                # Optuna would lower `high` to the last step and warn. The user must write the values that are tried.
                warnings.simplefilter("error", UserWarning)
                parsed = cls(**numbers, log=log, is_whole=is_whole)
                _ = parsed.distribution  # Optuna checks the bounds
        except (ValueError, ArithmeticError, UserWarning) as error:  # Optuna's message names the broken rule
            raise ConfigError(
                f"the range of `{key}` must be one that Optuna accepts, but got {dict(value)!r}: {first_line(error)}."
            ) from error
        return parsed

    def describe(self) -> Any:
        """Returns the range in the form of a sweep file."""
        if self.choices:
            return list(self.choices)
        step = {} if self.step == (1 if self.is_whole else None) else {"step": self.step}
        return {"low": self.low, "high": self.high, "log": self.log, **step}

    @cached_property
    def distribution(self) -> BaseDistribution:
        """The range as Optuna's studies and samplers read it."""
        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.is_whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    @property
    def ends(self) -> list[Any]:
        """Every choice of a list, or both bounds."""
        return list(self.choices) or [self.low, self.high]

    @property
    def is_single(self) -> bool:
        """Whether there is only one value."""
        return len(self.choices) == 1 if self.choices else self.low == self.high

    @property
    def are_numbers(self) -> bool:
        """Whether all choices are numbers."""
        return all(map(is_number, self.choices))

    @cached_property
    def sorted_choices(self) -> list[Any]:
        """The choices in an order that does not depend on the file's order: numbers ascending, others by type."""
        are_numbers = self.are_numbers
        return sorted(self.choices, key=lambda choice: (choice if are_numbers else type(choice).__name__, repr(choice)))

    @property
    def encoded(self) -> Range:
        """The range in a point: for choices, the range of their indices. The indices of numbers have an order."""
        if not self.choices:
            return self
        count = len(self.choices)
        return Range(low=0, high=count - 1, is_whole=True) if self.are_numbers else Range(choices=range(count))

    def encode(self, value: Any) -> Any:
        """Returns a value as it is in a point: the index of a choice, or the number."""
        # compared as text, because 1, 1.0 and True are equal
        return [repr(choice) for choice in self.sorted_choices].index(repr(value)) if self.choices else value

    def decode(self, place: Any) -> Any:
        """Returns the value that is encoded as `place` in a point."""
        return self.sorted_choices[place] if self.choices else place

    def interpolate(self, fraction: float) -> float:
        """Returns the number at a fraction of the way from the lower to the upper bound, rounded to a step."""
        step = self.step or 0
        # half a step beyond both ends, so that the values at the ends are as frequent as the others
        low, high = self.low - step / 2, self.high + step / 2
        if self.log:
            value = math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
        else:
            value = low + fraction * (high - low)
        if step:
            value = round((value - self.low) / step) * step + self.low
        return min(max(value, self.low), self.high)

    def find_fraction(self, value: float) -> float:
        """Returns how far a number is on the way from the lower to the upper bound."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


Space = dict[str, Range]
"""The range of each swept key."""


def describe_space(space: Space) -> dict[str, Any]:
    """Returns a space in the form of a sweep file, for the sweep's record."""
    return {key: range_.describe() for key, range_ in space.items()}
