"""Sorted tables of the trials at each rung, so that a decision reads only the best trials.

An arm may have 100,000 trials. Comparing all of them at each report would take longer than training a trial.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from lorasweep.sweep.controller.stopping_rules import Row, RungOrder, StoppingRule
from lorasweep.sweep.controller.trial import Trial

TableRow = tuple[str, int, Row]
"""Table name, rung and row."""


class RungTables:
    """Four sorted tables for each rung of an arm's stopping rule.

    - `arrived`: the trials that have a value at the rung and did not fail.
    - `unlearned`: the trials of `arrived` whose value is no better than that of the constant answer.
    - `waiting`: the running and paused trials of `arrived` that may not yet train beyond the rung.
    - `below`: the running and paused trials that have not reached the rung and do not wait at a lower rung.

    The first rows of `arrived` are the trials that may train beyond the rung. The stopping rule gives their number.
    """

    def __init__(self, rule: StoppingRule, trials: Mapping[int, Trial], *, order: RungOrder) -> None:
        """Creates empty tables.

        Args:
            rule: The stopping rule.
            trials: All trials of the arm by number; the caller adds new trials to this mapping.
            order: How trials are compared.
        """
        self._rule = rule
        self._trials = trials
        self._order = order
        self._tables: dict[tuple[str, int], list[Row]] = {
            (name, rung): [] for name in ("arrived", "unlearned", "waiting", "below") for rung in rule.rungs
        }

    def list_rows(self, trial: Trial) -> set[TableRow]:
        """Returns the rows that the tables must have for a trial in its current state."""
        rows: set[TableRow] = set()
        waits = False
        for rung in self._rule.rungs:
            if rung in trial.values:
                if trial.state in ("failed", "infeasible"):
                    continue
                row = self._order.get_row(trial, rung)
                rows.add(("arrived", rung, row))
                if self._order.has_learned_nothing(trial, rung):
                    rows.add(("unlearned", rung, row))
                if trial.is_live and rung not in trial.passed:
                    rows.add(("waiting", rung, row))
                    waits = True
            elif trial.is_live and not waits:
                rows.add(("below", rung, (0.0, 0.0, trial.number)))
        return rows

    def update_rows(self, before: set[TableRow], after: set[TableRow]) -> None:
        """Replaces a trial's old rows by its new rows."""
        for name, rung, row in before - after:
            table = self._tables[name, rung]
            del table[bisect_left(table, row)]
        for name, rung, row in after - before:
            insort(self._tables[name, rung], row)

    def may_train_beyond(self, trial: Trial, rung: int, *, all_begun: bool) -> bool:
        """Returns whether a trial that has reached a rung may train beyond it.

        `all_begun` is True if all trials of the arm have begun.
        """
        if trial.state in ("failed", "infeasible"):
            return False
        return self._is_kept(self._order.get_row(trial, rung), rung, self._count_kept(rung, all_begun=all_begun))

    def next_promoted(self, *, all_begun: bool) -> tuple[Trial, int] | None:
        """Returns the next trial to promote and its rung, or None if no paused trial may continue.

        Higher rungs come first; within a rung, better trials come first.
        """
        if not self._rule.rungs:
            return None
        counts = self._count_kept(self._rule.rungs[-1], all_begun=all_begun)
        for rung in reversed(self._rule.rungs):
            for trial in self._kept_waiting(rung, counts):
                if trial.state == "paused":
                    return trial, rung
        return None

    def has_any_below_first_rung(self) -> bool:
        """Returns whether a running or paused trial has not reached the first rung."""
        return bool(self._tables["below", self._rule.rungs[0]])

    def count_unlearned(self) -> tuple[int, int]:
        """Returns how many trials at the first rung are no better than the constant answer, and how many are there."""
        first = self._rule.rungs[0]
        return len(self._tables["unlearned", first]), len(self._tables["arrived", first])

    def _count_kept(self, last: int, *, all_begun: bool) -> dict[int, int]:
        """Returns how many trials may train beyond each rung up to the rung `last`."""
        counts: dict[int, int] = {}
        for rung in self._rule.rungs:
            if rung > last:
                break
            all_arrived = all_begun and self._have_all_arrived(rung, counts)
            counts[rung] = self._rule.count_kept(self._tables["arrived", rung], all_arrived=all_arrived)
        return counts

    def _have_all_arrived(self, rung: int, counts: Mapping[int, int]) -> bool:
        """Returns whether no running or paused trial can still reach a rung.

        A trial can reach the rung if it is in the table `below`, or if it waits at a lower rung and is among the best
        trials there, whose number is in `counts`.
        """
        if self._tables["below", rung]:
            return False
        return not any(
            rung not in trial.values and trial.waits_at(self._rule.rungs) == lower
            for lower in counts
            for trial in self._kept_waiting(lower, counts)
        )

    def _kept_waiting(self, rung: int, counts: Mapping[int, int]) -> Iterator[Trial]:
        """Yields the trials that wait at a rung and may train beyond it, best first."""
        for row in self._tables["waiting", rung]:
            if not self._is_kept(row, rung, counts):
                return
            yield self._trials[row[-1]]

    def _is_kept(self, row: Row, rung: int, counts: Mapping[int, int]) -> bool:
        return counts[rung] > 0 and row <= self._tables["arrived", rung][counts[rung] - 1]
