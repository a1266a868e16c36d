"""Chooses the winner of an arm, and lists its confirm runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from lorasweep.record import ConfirmRow, SweepRecord, TrialRow, TrialState
from lorasweep.wording import join_words


class _ScoredTrial(Protocol):
    @property
    def number(self) -> int | None: ...
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
    scored = [(sign * t.value, t.number or 0, t) for t in trials if t.state == "complete" and t.value is not None]
    return min((entry for entry in scored if math.isfinite(entry[0])), default=(0, 0, None))[2]


def list_confirm_rows(subject: str, *, record: SweepRecord) -> list[ConfirmRow]:
    """Returns the confirm runs of a subject. A sweep that grew may also have runs of its former setting."""
    current = {(row.subject, row.setting) for row in record.settings}
    return [row for row in record.confirm if row.subject == subject and (row.subject, row.setting) in current]


def find_winners(record: SweepRecord) -> dict[str, TrialRow | None]:
    """Returns the winner of each arm that trains; None for an arm without a complete trial."""
    trained = [arm.name for arm in record.arms if arm.method != "frozen"]
    by_arm = {name: [trial for trial in record.trials if trial.arm == name] for name in trained}
    return {name: find_winner(trials, record=record) for name, trials in by_arm.items()}


def describe_confirmation(looks: Sequence[int]) -> str:
    """Returns a phrase that says what the confirm stage does, from the numbers of seeds at its looks."""
    seeds = join_words([str(look) for look in looks], last="or")
    until = ", until the questions are settled" if len(looks) > 1 else ""
    noun = "seed" if tuple(looks) == (1,) else "seeds"
    return f"the chosen settings again on {seeds} fresh {noun}, scored once on test data{until}"
