"""One trial of an arm as the controller sees it, and the names of its user attributes in the journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from lorasweep.record import TrialState

ASSIGNMENT_ATTRIBUTE = "lorasweep:turn"
"""The last assignment of a trial: the fields `order`, `passed`, `promoted`, `worker` and `request` of a `Trial`.

These fields say when the controller gave the trial to a worker, to which one, and how far it may train. The
controller ignores trials of a study that don't have this attribute.
"""
PAUSED_ATTRIBUTE = "lorasweep:paused_at"
"""Step of the evaluation after which the trial's run was last paused."""
LOSSES_ATTRIBUTE = "lorasweep:rung_losses"
"""Validation loss by rung."""
REASON_ATTRIBUTE = "lorasweep:reason"
"""Why the trial failed, was pruned or does not fit in memory."""
INFEASIBLE_ATTRIBUTE = "lorasweep:infeasible"
"""True for a trial that does not fit in memory."""
SCORE_ATTRIBUTE = "lorasweep:score"
"""The best value of the trial's run. For a trial that is not complete, Optuna has the last value only."""
SLOT_STEPS_ATTRIBUTE = "lorasweep:slot_steps"
"""The run's share of the slots that its packs were planned with; missing for a run alone."""
ENDED_STATES: dict[OptunaState, TrialState] = {
    OptunaState.COMPLETE: "complete",
    OptunaState.PRUNED: "pruned",
    OptunaState.FAIL: "failed",
}


@dataclass(kw_only=True, eq=False)
class Trial:
    """One trial of an arm as the controller sees it."""

    number: int
    params: Mapping[str, Any]
    order: int
    """Position in the order in which a stage hands out new and promoted trials, from 0.

    If the trial's worker is gone and the trial is handed out again, the position stays the same.
    """
    passed: frozenset[int] = frozenset()
    """The rungs beyond which the trial may train."""
    promoted: frozenset[int] = frozenset()
    """The rungs in `passed` at which the trial was paused before it was allowed to continue."""
    values: dict[int, float] = field(default_factory=dict)
    """The metric's value at each evaluation, by step."""
    losses: dict[int, float] = field(default_factory=dict)
    """The validation loss at each rung."""
    state: TrialState = "running"
    is_in_training: bool = False
    """Whether a worker trains the trial now."""
    worker: str = ""
    """Name of the worker that last received the trial; empty for the worker of the controller's process."""
    request: int = 0
    """Number of the worker's request that was answered with this trial."""

    @property
    def is_live(self) -> bool:
        """Whether the trial runs or is paused."""
        return self.state in ("running", "paused")

    def waits_at(self, rungs: Iterable[int]) -> int | None:
        """Returns the lowest of these rungs that the trial has reached and may not train beyond, or None."""
        return next((rung for rung in rungs if rung in self.values and rung not in self.passed), None)

    @property
    def assignment_attribute(self) -> dict[str, Any]:
        """The value of the user attribute `ASSIGNMENT_ATTRIBUTE`."""
        attribute = {"order": self.order, "passed": sorted(self.passed), "promoted": sorted(self.promoted)}
        return attribute | ({"worker": self.worker, "request": self.request} if self.worker else {})


def read_trial(frozen: FrozenTrial, *, session: str | None) -> Trial:
    """Returns the controller's trial for a trial of a study.

    `session` is the prefix of the names of workers that may train trials now; None if no worker trains.
    """
    assignment_attribute = frozen.user_attrs[ASSIGNMENT_ATTRIBUTE]
    trial = Trial(
        number=frozen.number,
        params=dict(frozen.params),
        order=assignment_attribute["order"],
        passed=frozenset(assignment_attribute["passed"]),
        promoted=frozenset(assignment_attribute["promoted"]),
        values=dict(frozen.intermediate_values),
        losses={int(step): loss for step, loss in frozen.user_attrs.get(LOSSES_ATTRIBUTE, {}).items()},
        state=read_state(frozen),
        worker=assignment_attribute.get("worker", ""),
        request=assignment_attribute.get("request", 0),
    )
    # The trial is paused if it was paused after its last evaluation and was not promoted since. A process that was
    # killed between the report of this evaluation and the pause leaves a running trial, which reports the step again.
    last = max(trial.values, default=0)
    if trial.state == "running" and frozen.user_attrs.get(PAUSED_ATTRIBUTE) == last and last not in trial.promoted:
        trial.state = "paused"
    if trial.state == "running" and session is not None:
        trial.is_in_training = trial.worker.startswith(session)
    return trial


def read_state(frozen: FrozenTrial) -> TrialState:
    """Returns a trial's state as the record calls it; `running` if the trial has not ended."""
    return "infeasible" if frozen.user_attrs.get(INFEASIBLE_ATTRIBUTE) else ENDED_STATES.get(frozen.state, "running")
