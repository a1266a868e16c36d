"""Converts an arm's parameters to points, which Optuna's samplers read, and points to parameters.

A point has the index of a choice instead of the choice. Choices that are numbers are sorted, so that a model knows that
rank 8 lies between 4 and 16. Other choices are categories. A learning rate that is searched on a log scale becomes the
coordinate u of the rate law (`rate_law`), whose best value is about the same at every rank and α.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lorasweep.config.run import LR
from lorasweep.sweep.controller.rate_law import LAW_KEYS, RateLaw
from lorasweep.sweep.definition.space import Space, list_corner_values

Point = dict[str, Any]
"""A value for each key that can vary. For a list of choices the value is the index of a choice."""


class SpaceEncoding:
    """Converts an arm's parameters to points and back. Keys are sorted, so their order in the file has no effect."""

    def __init__(self, space: Space, *, law: RateLaw | None = None) -> None:
        self._space: Space = {key: space[key] for key in sorted(space)}
        self._law = law or RateLaw(defaults={})
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
        rates = self.ranges.get(LR)
        self._rates = rates if isinstance(rates, FloatDistribution) and rates.log and LR not in self.choices else None
        """The range of the learning rate, if points have u in its place."""
        if self._rates is not None:
            factors = [self._law.factor(params) for params in self._list_corners()]
            self.ranges[LR] = FloatDistribution(
                self._rates.low * min(factors), self._rates.high * max(factors), log=True
            )

    def encode(self, params: Mapping[str, Any]) -> Point:
        point = {key: params[key] for key in self.ranges}
        for key in self.choices.keys() & self.ranges:
            # compared as text, because 1, 1.0 and True are equal
            point[key] = [repr(choice) for choice in self.choices[key]].index(repr(params[key]))
        if self._rates is not None:
            point[LR] = params[LR] * self._law.factor(params)
        return point

    def decode(self, point: Point) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for key, distribution in self._space.items():
            if key in self.choices:
                params[key] = self.choices[key][point.get(key, 0)]
            elif isinstance(distribution, FloatDistribution | IntDistribution):
                params[key] = point.get(key, distribution.low)
        if self._rates is not None:
            rate = point[LR] / self._law.factor(params)
            params[LR] = min(max(rate, self._rates.low), self._rates.high)
        return params

    def move_into_range(self, point: Point, fraction: float) -> Point:
        """Returns the point if its learning rate is in range. Else u is that of the rate at `fraction` of the range."""
        if self._rates is None:
            return point
        factor = self._law.factor(self.decode(point))
        low, high = self._rates.low * factor, self._rates.high * factor
        return point if low <= point[LR] <= high else {**point, LR: low * (high / low) ** fraction}

    def _list_corners(self) -> Iterator[dict[str, Any]]:
        """Yields all combinations of the ends of the swept keys that the factor of the rate law depends on."""
        ends = {key: list_corner_values(self._space[key]) for key in LAW_KEYS if key in self._space}
        return (dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values()))


def _sort_choices(choices: Iterable[Any]) -> tuple[list[Any], bool]:
    """Returns choices in an order that does not depend on the file's order, and whether all choices are numbers."""
    are_numbers = all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices)
    if are_numbers:
        return sorted(choices, key=lambda choice: (choice, repr(choice))), True
    return sorted(choices, key=lambda choice: (type(choice).__name__, repr(choice))), False
