"""Stopping rules: which of an arm's trials may go on beyond a rung.

A rung is a step at which trials are compared. A rule is a pure function of values and trial numbers: neither the order
in which values arrive nor a clock changes what it says. The controller pauses a trial outside of the better part of its
rung, and lets it go on when it later belongs to it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Ranked = Sequence[tuple[float, int]]
"""Value (lower is better) and number of trials, best first; of equal values the earlier trial is first."""


class StoppingRule(Protocol):
    """What the controller must know of a rule."""

    @property
    def rungs(self) -> tuple[int, ...]:
        """Optimizer steps at which trials are compared, ascending; each is a step with an evaluation."""

    def count_better(self, ranked: Ranked, *, all_arrived: bool) -> int:
        """Returns how many of the trials at a rung may go on beyond it: so many of the best ones.

        Args:
            ranked: Every trial of the arm that has reached the rung and has not failed since.
            all_arrived: Whether no further trial of the arm can reach the rung.
        """


@dataclass(frozen=True, kw_only=True)
class NoStopping:
    """Every trial runs to its end."""

    rungs: tuple[int, ...] = ()

    def count_better(self, ranked: Ranked, *, all_arrived: bool) -> int:
        """Returns the number of all of them."""
        return len(ranked)


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

    def count_better(self, ranked: Ranked, *, all_arrived: bool) -> int:
        """Returns the size of the best share."""
        quotient = len(ranked) / self.reduction_factor
        count = max(math.ceil(quotient), self.min_survivors) if all_arrived else math.floor(quotient)
        return min(count, len(ranked))


@dataclass(frozen=True, kw_only=True)
class MedianOfPeers:
    """A trial goes on if it is no worse than the median of all trials at the rung, running ones included.

    Optuna's MedianPruner compares with complete trials only, so that in a pack, where all trials run at once, it never
    stops one.
    """

    rungs: tuple[int, ...]
    min_trials: int
    """Trials that must have reached a rung before any goes on, unless no more can come."""

    def count_better(self, ranked: Ranked, *, all_arrived: bool) -> int:
        """Returns how many are at or below the median."""
        if not ranked or (len(ranked) < self.min_trials and not all_arrived):
            return 0
        half = len(ranked) // 2
        median = ranked[half][0] if len(ranked) % 2 else (ranked[half - 1][0] + ranked[half][0]) / 2
        return bisect_right(ranked, median, key=lambda row: row[0])
