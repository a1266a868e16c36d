"""Rows of a sweep's record, from its arms and from what Optuna's storage holds of each trial."""

from __future__ import annotations

from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import CONFIRM_ENDING
from lorasweep.record import ArmRow, ConfirmRow, TrialRow
from lorasweep.record import TrialState as RowState
from lorasweep.sweep.definition import Arm
from lorasweep.sweep.space import describe_space

RUN_ATTRIBUTE = "lorasweep:run"
WORKER_ATTRIBUTE = "lorasweep:worker"
"""The worker that owns a trial."""
REASON_ATTRIBUTE = "lorasweep:reason"
INFEASIBLE_ATTRIBUTE = "lorasweep:infeasible"
SCORE_ATTRIBUTE = "lorasweep:score"
DUPLICATE_ATTRIBUTE = "lorasweep:duplicate_of"
FUNCTION_ATTRIBUTE = "lorasweep:function"
"""Names what the trial trains, so that a sweep that goes on need not compose every earlier trial again."""
WINNER_ATTRIBUTE = "lorasweep:winner"
RUNS_FOLDER = "runs"
STATES: dict[TrialState, RowState] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
"""How a trial ended, in the words of a record; another one is running."""
SEED = "seed"
"""The one parameter of a trial of the confirm stage."""


def run_name(arm: str, number: int) -> str:
    """Returns the folder of a run of the search, relative to the sweep's."""
    return f"{RUNS_FOLDER}/{arm}-{number:04d}"


def confirm_run_name(arm: str, number: int) -> str:
    """Returns the folder of a run of the confirm stage, relative to the sweep's; no arm's name ends as it begins."""
    return f"{RUNS_FOLDER}/{arm}{CONFIRM_ENDING}-{number:04d}"


def arm_row(arm: Arm, config: RunConfig) -> ArmRow:
    """Returns an arm's row; `config` is one of its runs."""
    return ArmRow(
        name=arm.name,
        method=config.method.name,
        trials=arm.trials,
        settings=dict(arm.settings),
        space=describe_space(arm.space),
        sampler=arm.driver.sampler.name,
        pruner=arm.driver.pruner.name,
        expanded_from=arm.expanded_from,
        expanded=dict(arm.expanded),
    )


def trial_row(arm: str, trial: FrozenTrial) -> TrialRow:
    """Returns the row of a trial of the search."""
    return TrialRow(
        arm=arm,
        number=trial.number,
        state=_state(trial),
        params=dict(trial.params),
        value=_value(trial),
        run=run_name(arm, trial.number),
        reason=trial.user_attrs.get(REASON_ATTRIBUTE),
        duplicate_of=trial.user_attrs.get(DUPLICATE_ATTRIBUTE),
    )


def confirm_row(arm: str, trial: FrozenTrial, *, winner: int) -> ConfirmRow:
    """Returns the row of a trial of the confirm stage."""
    state = _state(trial)
    assert state != "pruned"
    return ConfirmRow(
        arm=arm,
        trial=winner,
        seed=trial.params[SEED],
        state=state,
        run=confirm_run_name(arm, trial.number),
        value=_value(trial),
        reason=trial.user_attrs.get(REASON_ATTRIBUTE),
    )


def _value(trial: FrozenTrial) -> float | None:
    """The score; Optuna gives one that does not fit the value of its last evaluation."""
    infeasible = trial.user_attrs.get(INFEASIBLE_ATTRIBUTE)
    return None if infeasible else trial.user_attrs.get(SCORE_ATTRIBUTE, trial.value)


def _state(trial: FrozenTrial) -> RowState:
    return "infeasible" if trial.user_attrs.get(INFEASIBLE_ATTRIBUTE) else STATES.get(trial.state, "running")
