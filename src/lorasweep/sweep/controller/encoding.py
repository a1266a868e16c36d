"""An arm's search space as Optuna's samplers see it: the parameters of a trial become a point, and a point parameters.

A sampler sees a choice as its position. In a list of numbers the positions ascend, so that a model knows that rank 8
lies between 4 and 16; in any other list they are categories.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.sweep.definition.space import Space

Point = dict[str, Any]
"""One value for each key that has more than one value; the value of a list of choices is a position."""


class SpaceEncoding:
    """Turns an arm's parameters into points and back. Keys are sorted: their order in the file changes nothing."""

    def __init__(self, space: Space) -> None:
        self._space: Space = {key: space[key] for key in sorted(space)}
        self.choices: dict[str, list[Any]] = {}
        """For each key with a list of choices, the choices by position."""
        self.ranges: Space = {}
        """Optuna's range of each key that has more than one value."""
        for key, distribution in self._space.items():
            encoded = distribution
            if isinstance(distribution, CategoricalDistribution):
                self.choices[key], is_ordered = _order_choices(distribution.choices)
                count = len(distribution.choices)
                encoded = IntDistribution(0, count - 1) if is_ordered else CategoricalDistribution(range(count))
            if not encoded.single():
                self.ranges[key] = encoded
        # by their text, because 1, 1.0 and True are equal
        self._positions = {
            key: {repr(choice): position for position, choice in enumerate(choices)}
            for key, choices in self.choices.items()
        }

    def encode(self, params: Mapping[str, Any]) -> Point:
        """Returns the point of a trial's parameters."""
        return {
            key: self._positions[key][repr(params[key])] if key in self.choices else params[key] for key in self.ranges
        }

    def decode(self, point: Point) -> dict[str, Any]:
        """Returns the parameters of a point, choices as the user wrote them."""
        params: dict[str, Any] = {}
        for key, distribution in self._space.items():
            if key in self.choices:
                params[key] = self.choices[key][point.get(key, 0)]
            elif isinstance(distribution, FloatDistribution | IntDistribution):
                params[key] = point.get(key, distribution.low)
        return params


def _order_choices(choices: Iterable[Any]) -> tuple[list[Any], bool]:
    """Returns choices in an order that doesn't depend on the file's, and whether they are ascending numbers."""
    listed = list(choices)
    if all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in listed):
        return sorted(listed, key=lambda choice: (choice, repr(choice))), True
    return sorted(listed, key=lambda choice: (type(choice).__name__, repr(choice))), False
