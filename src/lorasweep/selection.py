"""Chooses the winner of an arm, and lists its confirm runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, TypeVar

from lorasweep.record import ConfirmRow, SweepRecord, TrialRow, TrialState


class _ScoredTrial(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def state(self) -> TrialState: ...
    @property
    def value(self) -> float | None: ...


ScoredT = TypeVar("ScoredT", bound=_ScoredTrial)


def find_winner(trials: Iterable[ScoredT], *, record: SweepRecord) -> ScoredT | None:
    """Returns the trial of an arm that the confirm stage runs; None if no trial is complete.

    It is the best complete trial of the search. Of equals, it is the trial with the lowest number.
    """
    sign = 1 if record.direction == "minimize" else -1
    scored = [(sign * t.value, t.number, t) for t in trials if t.state == "complete" and t.value is not None]
    return min((entry for entry in scored if math.isfinite(entry[0])), default=(0, 0, None))[2]


def list_confirm_rows(arm: str, winner: _ScoredTrial | None, *, record: SweepRecord) -> list[ConfirmRow]:
    """Returns the confirm runs of an arm's winner. A sweep that grew may also have runs of a former winner."""
    return [row for row in record.confirm if winner is not None and (row.arm, row.trial) == (arm, winner.number)]


def find_winners(record: SweepRecord) -> dict[str, TrialRow | None]:
    """Returns the winner of each arm that trains; None for an arm without a complete trial."""
    trained = [arm.name for arm in record.arms if arm.method != "frozen"]
    by_arm = {name: [trial for trial in record.trials if trial.arm == name] for name in trained}
    return {name: find_winner(trials, record=record) for name, trials in by_arm.items()}


def describe_confirmation(num_seeds: int) -> str:
    """Returns a phrase that says what the confirm stage does."""
    fresh = "1 fresh seed" if num_seeds == 1 else f"{num_seeds} fresh seeds"
    return f"the winner of each arm again on {fresh}, scored once on test data"
