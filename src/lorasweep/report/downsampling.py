"""Selects the trials of a large sweep that the page shows, so that it opens quickly. The CSV files have all trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

MAX_FIGURE_POINTS = 2_000
"""A figure has at most about this many points or lines: more make the page slow to open."""
MAX_TABLE_ROWS = 1_000
"""The table of trials has at most about this many rows: more make the page slow to open."""
MIN_GROUP_ITEMS = 10
"""A group keeps at least this many items, or all if it has fewer, however large the other groups are."""


def downsample(items: Sequence[T], max_items: int) -> Sequence[T]:
    """Returns at most `max_items` (>= 2) evenly spaced items, the first and the last among them."""
    if len(items) <= max_items:
        return items
    last = len(items) - 1
    return [items[round(index * last / (max_items - 1))] for index in range(max_items)]


def allocate(sizes: Sequence[int], max_items: int) -> list[int]:
    """Returns how many items of each group to show: in proportion to its size, about `max_items` in all."""
    total = sum(sizes)
    return [
        size if total <= max_items else min(size, max(MIN_GROUP_ITEMS, max_items * size // total)) for size in sizes
    ]


def downsample_groups(
    groups: Sequence[Sequence[T]], *, key: Callable[[T], Any], max_items: int = MAX_FIGURE_POINTS
) -> list[Sequence[T]]:
    """Returns groups with about `max_items` items in all.

    Args:
        groups: Items by group, such as the trials of each arm.
        key: The value by which the items of a reduced group are spread evenly, such as the score.
        max_items: The number of items in all.
    """
    sizes = allocate([len(group) for group in groups], max_items)
    return [
        group if size == len(group) else downsample(sorted(group, key=key), size)
        for group, size in zip(groups, sizes, strict=True)
    ]


def describe_downsampling(shown: Sequence[Sequence[T]], groups: Sequence[Sequence[T]], *, file: str) -> str:
    """Returns a space and a sentence about the items that a figure leaves out; an empty text if it shows all.

    Args:
        shown: The items that are drawn, by group.
        groups: All items, by group.
        file: The name of the file that has all items.
    """
    drawn, total = sum(map(len, shown)), sum(map(len, groups))
    if drawn == total:
        return ""
    return f" {drawn:,} of {total:,} are drawn, evenly over their scores, the best among them; `{file}` has all."
