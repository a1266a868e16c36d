"""Converts an arm's parameters to points, which Optuna's samplers read, and points to parameters.

A point has the index of a choice instead of the choice. Choices that are numbers are sorted, so that a model knows that
rank 8 lies between 4 and 16. Other choices are categories.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.sweep.definition.space import Space

Point = dict[str, Any]
"""A value for each key that can vary. For a list of choices the value is the index of a choice."""


class SpaceEncoding:
    """Converts an arm's parameters to points and back. Keys are sorted, so their order in the file has no effect."""

    def __init__(self, space: Space) -> None:
        self._space: Space = {key: space[key] for key in sorted(space)}
        self.choices: dict[str, list[Any]] = {}
        """The sorted choices of each key that has a list of choices."""
        self.ranges: Space = {}
        """Optuna's range of each key that can vary."""
        for key, distribution in self._space.items():
            encoded = distribution
            if isinstance(distribution, CategoricalDistribution):
                self.choices[key], are_numbers = _sort_choices(distribution.choices)
                count = len(distribution.choices)
                encoded = IntDistribution(0, count - 1) if are_numbers else CategoricalDistribution(range(count))
            if not encoded.single():
                self.ranges[key] = encoded

    def encode(self, params: Mapping[str, Any]) -> Point:
        point = {key: params[key] for key in self.ranges}
        for key in self.choices.keys() & self.ranges:
            # compared as text, because 1, 1.0 and True are equal
            point[key] = [repr(choice) for choice in self.choices[key]].index(repr(params[key]))
        return point

    def decode(self, point: Point) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for key, distribution in self._space.items():
            if key in self.choices:
                params[key] = self.choices[key][point.get(key, 0)]
            elif isinstance(distribution, FloatDistribution | IntDistribution):
                params[key] = point.get(key, distribution.low)
        return params


def _sort_choices(choices: Iterable[Any]) -> tuple[list[Any], bool]:
    """Returns choices in an order that does not depend on the file's order, and whether all choices are numbers."""
    are_numbers = all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices)
    if are_numbers:
        return sorted(choices, key=lambda choice: (choice, repr(choice))), True
    return sorted(choices, key=lambda choice: (type(choice).__name__, repr(choice))), False
