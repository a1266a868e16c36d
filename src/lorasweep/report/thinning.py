"""Picks the trials of a large sweep that its figures and its table show, so that the page opens quickly.

A figure's trials are spread evenly over their scores, the best and the worst among them. The CSV files have all trials.
Comes before the figures and the page.
"""

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


def thin(items: Sequence[T], most: int) -> Sequence[T]:
    """Returns at most `most` (>= 2) evenly spaced items, the first and the last among them."""
    if len(items) <= most:
        return items
    last = len(items) - 1
    return [items[round(index * last / (most - 1))] for index in range(most)]


def share_out(sizes: Sequence[int], most: int) -> list[int]:
    """Returns how many items of each group to show: in proportion to its size, about `most` in all."""
    total = sum(sizes)
    return [size if total <= most else min(size, max(MIN_GROUP_ITEMS, most * size // total)) for size in sizes]


def thin_groups(
    groups: Sequence[Sequence[T]], *, key: Callable[[T], Any], most: int | None = None
) -> list[Sequence[T]]:
    """Returns groups with about `most` items in all. Each is spread evenly over `key` and keeps its ends.

    Args:
        groups: Items by group, such as the trials of each arm.
        key: Gives the value that items are sorted by, such as the score.
        most: Number of items in all. Default: `MAX_FIGURE_POINTS`.
    """
    shares = share_out([len(group) for group in groups], MAX_FIGURE_POINTS if most is None else most)
    return [
        group if share == len(group) else thin(sorted(group, key=key), share)
        for group, share in zip(groups, shares, strict=True)
    ]


def describe_thinning(shown: Sequence[Sequence[T]], groups: Sequence[Sequence[T]], *, file: str) -> str:
    """Returns a space and a sentence on how many items a figure leaves out; an empty text if it shows all.

    Args:
        shown: The items that are drawn, by group.
        groups: All items, by group.
        file: Name of the file that has all of them.
    """
    drawn, total = sum(map(len, shown)), sum(map(len, groups))
    if drawn == total:
        return ""
    return f" {drawn:,} of {total:,} are drawn, evenly over their scores, the best among them; `{file}` has all."
