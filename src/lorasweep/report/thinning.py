"""What of a large sweep is shown one by one, so that its page opens quickly: a part that keeps the ends and the spread.

Comes before the figures and the page. Files have everything, and a sentence says what is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

MOST_POINTS = 2_000
"""Points or lines that a figure has."""
MOST_ROWS = 1_000
"""Rows that the table of trials has."""
LEAST = 10
"""Of a small group so many stay, whatever the others take."""


def thin(items: Sequence[T], most: int) -> Sequence[T]:
    """Returns at most `most` (>= 2) evenly spaced items, the first and the last among them."""
    if len(items) <= most:
        return items
    last = len(items) - 1
    return [items[round(index * last / (most - 1))] for index in range(most)]


def share_out(sizes: Sequence[int], most: int) -> list[int]:
    """Returns how many of each group may be shown, by its size, so that there are about `most` in all."""
    total = sum(sizes)
    return [size if total <= most else min(size, max(LEAST, most * size // total)) for size in sizes]


def thin_groups(
    groups: Sequence[Sequence[T]], *, key: Callable[[T], Any], most: int | None = None
) -> list[Sequence[T]]:
    """Returns groups with about `most` items in all, each spread evenly over `key`, its ends among them.

    Args:
        groups: Such as the trials of each arm.
        key: What items are sorted by, such as the score.
        most: Default: `MOST_POINTS`.
    """
    shares = share_out([len(group) for group in groups], MOST_POINTS if most is None else most)
    return [
        group if share == len(group) else thin(sorted(group, key=key), share)
        for group, share in zip(groups, shares, strict=True)
    ]


def describe_thinning(shown: Sequence[Sequence[T]], groups: Sequence[Sequence[T]], *, file: str) -> str:
    """Returns a sentence, with a space before it, on what a figure leaves out; nothing where it leaves out nothing.

    Args:
        shown: What is drawn, by groups.
        groups: What there is.
        file: Where all of it is.
    """
    drawn, total = sum(map(len, shown)), sum(map(len, groups))
    if drawn == total:
        return ""
    return f" {drawn:,} of {total:,} are drawn, evenly over their scores, the best among them; `{file}` has all."
