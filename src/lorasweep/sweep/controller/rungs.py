"""Sorted tables of the trials at each rung, so that a decision reads only the best trials.

An arm may have 100,000 trials. Comparing all of them at each report would take longer than training one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from lorasweep.sweep.controller.entry import LIVE, Entry
from lorasweep.sweep.controller.rules import StoppingRule

Place = tuple[str, int, tuple[float, int]]
"""A table, its rung, and a trial's row there."""


class Rungs:
    """The trials of an arm at each rung of its stopping rule.

    Three tables per rung, each sorted:

    - `reached`: value and number of each trial that has reached the rung and has not failed.
    - `waiting`: the rows of `reached` whose trial is running or paused and may not go on beyond the rung.
    - `below`: number of each running or paused trial that has not reached the rung and waits at no lower one.
    """

    def __init__(self, rule: StoppingRule, entries: Mapping[int, Entry], *, sign: int) -> None:
        """Makes empty tables.

        Args:
            rule: Which trials may go on beyond a rung.
            entries: All trials of the arm, by number; the caller adds to them.
            sign: 1 where lower values are better, -1 where higher ones are.
        """
        self._rule = rule
        self._entries = entries
        self._sign = sign
        self._tables: dict[tuple[str, int], list[tuple[float, int]]] = {
            (name, rung): [] for name in ("reached", "waiting", "below") for rung in rule.rungs
        }

    def places(self, entry: Entry) -> set[Place]:
        """Returns the rows that a trial has in the tables."""
        found: set[Place] = set()
        waits = False
        for rung in self._rule.rungs:
            if rung in entry.values:
                if entry.state in ("failed", "infeasible"):
                    continue
                found.add(("reached", rung, self._key(entry, rung)))
                if entry.state in LIVE and rung not in entry.passed:
                    found.add(("waiting", rung, self._key(entry, rung)))
                    waits = True
            elif entry.state in LIVE and not waits:
                found.add(("below", rung, (0.0, entry.number)))
        return found

    def move(self, before: set[Place], after: set[Place]) -> None:
        """Replaces the rows that a trial had by those that it has."""
        for name, rung, key in before - after:
            table = self._tables[name, rung]
            del table[bisect_left(table, key)]
        for name, rung, key in after - before:
            insort(self._tables[name, rung], key)

    def is_better(self, entry: Entry, rung: int, *, all_begun: bool) -> bool:
        """Whether a trial that has reached a rung belongs to its better part.

        Args:
            entry: The trial.
            rung: The rung.
            all_begun: Whether no further trial of the arm will begin.
        """
        places = self.places(entry)
        key = self._key(entry, rung)
        return ("reached", rung, key) in places and self._is_within(key, rung, self._counts(rung, all_begun=all_begun))

    def next_promoted(self, *, all_begun: bool) -> tuple[Entry, int] | None:
        """Returns the best paused trial of a better part, at the highest rung that has one, and the rung."""
        if not self._rule.rungs:
            return None
        counts = self._counts(self._rule.rungs[-1], all_begun=all_begun)
        for rung in reversed(self._rule.rungs):
            for entry in self._waiting_better(rung, counts):
                if entry.state == "paused":
                    return entry, rung
        return None

    def _counts(self, last: int, *, all_begun: bool) -> dict[int, int]:
        """Returns how many trials the better part of each rung up to this one has."""
        counts: dict[int, int] = {}
        for rung in self._rule.rungs:
            if rung > last:
                break
            counts[rung] = self._rule.count_better(
                self._tables["reached", rung], all_arrived=all_begun and self._all_arrived(rung, counts)
            )
        return counts

    def _all_arrived(self, rung: int, counts: Mapping[int, int]) -> bool:
        """Whether no trial that has begun can still reach a rung: each other one ended or stays paused at a lower one.

        Args:
            rung: The rung.
            counts: The size of the better part of each lower rung.
        """
        if self._tables["below", rung]:
            return False
        return not any(
            rung not in entry.values and self._lowest_wait(entry) == lower
            for lower in counts
            for entry in self._waiting_better(lower, counts)
        )

    def _waiting_better(self, rung: int, counts: Mapping[int, int]) -> Iterator[Entry]:
        """Yields the trials that wait at a rung and belong to its better part, best first."""
        for key in self._tables["waiting", rung]:
            if not self._is_within(key, rung, counts):
                return
            yield self._entries[key[1]]

    def _is_within(self, key: tuple[float, int], rung: int, counts: Mapping[int, int]) -> bool:
        return counts[rung] > 0 and key <= self._tables["reached", rung][counts[rung] - 1]

    def _lowest_wait(self, entry: Entry) -> int | None:
        return next((rung for rung in self._rule.rungs if rung in entry.values and rung not in entry.passed), None)

    def _key(self, entry: Entry, rung: int) -> tuple[float, int]:
        """Returns a trial's sort key at a rung: lower is better, and the earlier of two equal trials comes first."""
        value = entry.losses.get(rung, self._sign * entry.values[rung])
        return (math.inf if math.isnan(value) else value), entry.number
