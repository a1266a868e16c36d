"""Stopping rules: which of an arm's trials may go on beyond a rung.

A rung is a step at which trials are compared. A rule is a pure function of values and trial numbers: neither the order
in which values arrive nor a clock changes what it says. The controller pauses a trial outside of the better part of its
rung, and lets it go on when it later belongs to it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class StoppingRule(Protocol):
    """What the controller must know of a rule."""

    @property
    def rungs(self) -> tuple[int, ...]:
        """Optimizer steps at which trials are compared, ascending; each is a step with an evaluation."""

    def better_part(self, rung: int, values: Mapping[int, float], *, all_arrived: bool) -> frozenset[int]:
        """Returns the numbers of the trials that may go on beyond a rung.

        Args:
            rung: One of `rungs`.
            values: The value at the rung by trial number, lower is better, of every trial of the arm that has reached
                it and has not failed since.
            all_arrived: Whether no further trial of the arm can reach this rung.
        """


@dataclass(frozen=True, kw_only=True)
class NoStopping:
    """Every trial runs to its end."""

    rungs: tuple[int, ...] = ()

    def better_part(self, rung: int, values: Mapping[int, float], *, all_arrived: bool) -> frozenset[int]:
        """Returns all of them."""
        return frozenset(values)


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Promotion-type successive halving (Li et al. 2018, arXiv 1810.05934, algorithm 2).

    Of m trials at a rung the best floor(m / reduction_factor) may go on. Once no further trial can reach the rung, the
    best ceil(m / reduction_factor) may, and no fewer than `min_survivors`: of few trials an early rung says little.
    *Differs:* the paper's rule has neither the second count nor the minimum, because it does not know how many trials
    will come.
    """

    rungs: tuple[int, ...]
    reduction_factor: int
    min_survivors: int = 1

    def better_part(self, rung: int, values: Mapping[int, float], *, all_arrived: bool) -> frozenset[int]:
        """Returns the best share of them, ties settled by trial number."""
        quotient = len(values) / self.reduction_factor
        count = max(math.ceil(quotient), self.min_survivors) if all_arrived else math.floor(quotient)
        return frozenset(rank_trials(values)[:count])


@dataclass(frozen=True, kw_only=True)
class MedianOfPeers:
    """A trial goes on if it is no worse than the median of all trials at the rung, running ones included.

    Optuna's MedianPruner compares with complete trials only, so that in a pack, where all trials run at once, it never
    stops one.
    """

    rungs: tuple[int, ...]
    min_trials: int
    """Trials that must have reached a rung before any goes on, unless no more can come."""

    def better_part(self, rung: int, values: Mapping[int, float], *, all_arrived: bool) -> frozenset[int]:
        """Returns those at or below the median."""
        if not values or (len(values) < self.min_trials and not all_arrived):
            return frozenset()
        median = statistics.median(values.values())
        return frozenset(number for number, value in values.items() if value <= median)


def rank_trials(values: Mapping[int, float]) -> list[int]:
    """Returns trial numbers from the best (lowest) value to the worst; of equal values the earlier trial is first."""
    return sorted(values, key=lambda number: (values[number], number))
