"""Sorted tables of the trials at each rung, so that a decision reads only the best trials.

An arm may have 100,000 trials. To compare all of them at each report would take longer than to train one.

The better part of a rung is its best trials, as many as the stopping rule lets train beyond the rung.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from lorasweep.sweep.controller.stopping_rules import StoppingRule, cost_at
from lorasweep.sweep.controller.trial import Trial

Row = tuple[float, int]
"""A trial's cost and number: lower costs are better, and of equal trials the earlier one comes first."""
Place = tuple[str, int, Row]
"""A table, its rung, and a trial's row there."""


class RungTables:
    """Three sorted tables for each rung of an arm's stopping rule.

    - `arrived`: the trials that have a value at the rung and did not fail.
    - `waiting`: the running and paused trials of `arrived` that may not train beyond the rung (yet).
    - `below`: the running and paused trials that have not reached the rung and do not wait at a lower rung.
    """

    def __init__(self, rule: StoppingRule, trials: Mapping[int, Trial], *, sign: int) -> None:
        """Makes empty tables.

        Args:
            rule: Stopping rule, which says how many trials of a rung may train beyond it.
            trials: All trials of the arm by number; the caller adds new trials to this mapping.
            sign: 1 if lower values are better, -1 if higher values are better.
        """
        self._rule = rule
        self._trials = trials
        self._sign = sign
        self._tables: dict[tuple[str, int], list[Row]] = {
            (name, rung): [] for name in ("arrived", "waiting", "below") for rung in rule.rungs
        }

    def places(self, trial: Trial) -> set[Place]:
        """Returns the rows that a trial has in the tables."""
        found: set[Place] = set()
        waits = False
        for rung in self._rule.rungs:
            if rung in trial.values:
                if trial.state in ("failed", "infeasible"):
                    continue
                row = cost_at(trial, rung, sign=self._sign), trial.number
                found.add(("arrived", rung, row))
                if trial.is_live and rung not in trial.passed:
                    found.add(("waiting", rung, row))
                    waits = True
            elif trial.is_live and not waits:
                found.add(("below", rung, (0.0, trial.number)))
        return found

    def move(self, before: set[Place], after: set[Place]) -> None:
        """Removes a trial's old rows (`before`) from the tables and inserts its new rows (`after`)."""
        for name, rung, row in before - after:
            table = self._tables[name, rung]
            del table[bisect_left(table, row)]
        for name, rung, row in after - before:
            insort(self._tables[name, rung], row)

    def is_better(self, trial: Trial, rung: int, *, all_begun: bool) -> bool:
        """Returns whether a trial belongs to the better part of a rung that it has reached.

        Args:
            trial: The trial.
            rung: The rung.
            all_begun: Whether no further trial of the arm will begin.
        """
        row = cost_at(trial, rung, sign=self._sign), trial.number
        arrived = trial.state not in ("failed", "infeasible")
        return arrived and self._is_within(row, rung, self._counts(rung, all_begun=all_begun))

    def next_promoted(self, *, all_begun: bool) -> tuple[Trial, int] | None:
        """Returns the next trial to promote and its rung, or None.

        It is the best paused trial in the better part of its rung, at the highest rung that has such a trial.
        """
        if not self._rule.rungs:
            return None
        counts = self._counts(self._rule.rungs[-1], all_begun=all_begun)
        for rung in reversed(self._rule.rungs):
            for trial in self._waiting_better(rung, counts):
                if trial.state == "paused":
                    return trial, rung
        return None

    def _counts(self, last: int, *, all_begun: bool) -> dict[int, int]:
        """Returns the number of trials in the better part of each rung up to the rung `last`."""
        counts: dict[int, int] = {}
        for rung in self._rule.rungs:
            if rung > last:
                break
            all_arrived = all_begun and self._all_arrived(rung, counts)
            counts[rung] = self._rule.count_better(self._tables["arrived", rung], all_arrived=all_arrived)
        return counts

    def _all_arrived(self, rung: int, counts: Mapping[int, int]) -> bool:
        """Returns whether a rung is complete, if no further trial of the arm begins.

        It is complete if no live trial trains towards it, and no trial that waits at a lower rung belongs to the better
        part of that lower rung.

        Args:
            rung: The rung.
            counts: Number of trials in the better part of each lower rung.
        """
        if self._tables["below", rung]:
            return False
        return not any(
            rung not in trial.values and trial.waits_at(self._rule.rungs) == lower
            for lower in counts
            for trial in self._waiting_better(lower, counts)
        )

    def _waiting_better(self, rung: int, counts: Mapping[int, int]) -> Iterator[Trial]:
        """Yields the trials that wait at a rung and belong to its better part, best first."""
        for row in self._tables["waiting", rung]:
            if not self._is_within(row, rung, counts):
                return
            yield self._trials[row[1]]

    def _is_within(self, row: Row, rung: int, counts: Mapping[int, int]) -> bool:
        return counts[rung] > 0 and row <= self._tables["arrived", rung][counts[rung] - 1]
