"""Chooses trials of an arm: its Pareto front, the candidates of the select stage, and the winner."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any, Protocol, TypeVar

from lorasweep.config.run import SEED_KEYS
from lorasweep.record import RerunRow, RerunStage, SweepRecord, TrialRow, TrialState

T = TypeVar("T")


class _ScoredTrial(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def state(self) -> TrialState: ...
    @property
    def value(self) -> float | None: ...
    @property
    def second_value(self) -> float | None: ...


ScoredT = TypeVar("ScoredT", bound=_ScoredTrial)


def find_pareto_front(items: Iterable[T], *, costs: Callable[[T], tuple[float, float]]) -> list[T]:
    """Returns the items that no other item beats, by rising first cost. Of items with equal costs, returns the first.

    An item beats another one if one of its costs is lower and the other cost is not higher.
    """
    front: list[T] = []
    for item in sorted(items, key=costs):
        if not front or costs(item)[1] < costs(front[-1])[1]:
            front.append(item)
    return front


def list_candidates(trials: Iterable[ScoredT], *, record: SweepRecord) -> list[ScoredT]:
    """Returns the trials of an arm that the select stage runs again, the best of the search first.

    They have different settings. Seeds don't count as settings, because the stage replaces them. With two objectives,
    the trials on the arm's Pareto front come before all others.
    """
    sign = 1 if record.direction == "minimize" else -1
    scored = [(sign * t.value, t.number, t) for t in trials if t.state == "complete" and t.value is not None]
    best_first = [trial for _, _, trial in sorted(entry for entry in scored if math.isfinite(entry[0]))]
    on_front = {trial.number for trial in list_front(best_first, record=record)}
    candidates: dict[str, ScoredT] = {}
    for trial in sorted(best_first, key=lambda trial: trial.number not in on_front):
        settings = {key: value for key, value in trial.params.items() if key not in SEED_KEYS}
        candidates.setdefault(json.dumps(settings, sort_keys=True), trial)
        if len(candidates) == record.candidates:
            break
    return list(candidates.values())


def list_front(trials: Iterable[ScoredT], *, record: SweepRecord) -> list[ScoredT]:
    """Returns the trials on the Pareto front of score and second objective, best score first; none without the latter.

    No complete trial is better in one of both and at least as good in the other.
    """
    sign = 1 if record.direction == "minimize" else -1
    measured = [
        (sign * trial.value, trial.second_value, trial)
        for trial in trials
        if trial.state == "complete" and trial.value is not None and trial.second_value is not None
    ]
    finite = [entry for entry in measured if math.isfinite(entry[0])]
    return [trial for _, _, trial in find_pareto_front(finite, costs=lambda entry: entry[:2])]


def find_winner(arm: str, trials: Iterable[ScoredT], *, record: SweepRecord) -> ScoredT | None:
    """Returns the trial of an arm that the confirm stage runs; None if no trial is complete.

    It is the candidate with the best mean over its runs of the select stage. A candidate with a failed run comes after
    all candidates without one. Until all these runs have ended, and in an arm without them, it is the best trial of the
    search.
    """
    candidates = list_candidates(trials, record=record)
    numbers = {trial.number for trial in candidates}  # a sweep that grew also has runs of former candidates
    ended = [row for row in record.select if row.arm == arm and row.trial in numbers and row.state != "running"]
    num_ended = len(ended)
    if not num_ended or num_ended < len(candidates) * len(record.select_seeds):
        return candidates[0] if candidates else None
    sign = 1 if record.direction == "minimize" else -1

    def cost(trial: ScoredT) -> tuple[int, float]:
        values = list_select_scores(arm, trial.number, record=record)
        return -len(values), sign * fmean(values) if values else 0.0

    return min(candidates, key=cost)  # of equals the first, which is the best of the search


def list_select_scores(arm: str, number: int, *, record: SweepRecord) -> list[float]:
    """Returns the finite validation scores of a trial's complete runs of the select stage."""
    runs = [row for row in record.select if row.arm == arm and row.trial == number and row.state == "complete"]
    return [row.value for row in runs if row.value is not None and math.isfinite(row.value)]


def list_confirm_rows(arm: str, winner: _ScoredTrial | None, *, record: SweepRecord) -> list[RerunRow]:
    """Returns the confirm runs of an arm's winner. A sweep that grew may also have runs of a former winner."""
    return [row for row in record.confirm if winner is not None and (row.arm, row.trial) == (arm, winner.number)]


def find_winners(record: SweepRecord) -> dict[str, TrialRow | None]:
    """Returns the winner of each arm that trains; None for an arm without a complete trial."""
    trained = [arm.name for arm in record.arms if arm.method != "frozen"]
    by_arm = {name: [trial for trial in record.trials if trial.arm == name] for name in trained}
    return {name: find_winner(name, trials, record=record) for name, trials in by_arm.items()}


def describe_stage(stage: RerunStage, *, num_seeds: int, candidates: int) -> str:
    """Returns a phrase that says what the select or the confirm stage does."""
    fresh = "1 fresh seed" if num_seeds == 1 else f"{num_seeds} fresh seeds"
    if stage == "confirm":
        return f"the winner of each arm again on {fresh}, scored once on test data"
    return f"the best {candidates} trials of each arm again on {fresh}; the best mean on validation data wins"
