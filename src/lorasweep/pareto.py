"""The Pareto front: the trials that no other trial beats in both objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def find_pareto_front(items: Iterable[T], *, costs: Callable[[T], tuple[float, float]]) -> list[T]:
    """Returns the items that no other item beats, by rising first cost. Of items with equal costs, returns the first.

    An item beats another one if one of its costs is lower and the other cost is not higher.
    """
    front: list[T] = []
    for item in sorted(items, key=costs):
        if not front or costs(item)[1] < costs(front[-1])[1]:
            front.append(item)
    return front
