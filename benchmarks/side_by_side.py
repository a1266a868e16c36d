"""Times several ways of the same work in turn, and prints tables. The benchmarks import this module."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def time_in_turn(ways: Mapping[str, Callable[[], None]], *, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each way in each round. Every way takes its turn, so that a disturbance hits all.

    One more round comes first, to warm up. The first way of a round changes, so that each is first equally often.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for n in range(rounds + 1):
        first = n % len(order)
        for name in order[first:] + order[:first]:
            started = time.perf_counter()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if n:
                times[name].append(time.perf_counter() - started)
    return times


def compute_ratios(times: Mapping[str, Sequence[float]], over: str) -> dict[str, float]:
    """Returns the median over rounds of each way's time over that of the way `over` in the same round."""
    return {
        name: statistics.median(one / other for one, other in zip(own, times[over], strict=True))
        for name, own in times.items()
    }


def print_head(*columns: str) -> None:
    """Prints the head of a table in Markdown."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def print_row(*cells: object) -> None:
    """Prints a row of a table in Markdown; numbers have three significant digits."""
    print(f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True)
