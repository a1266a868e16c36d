"""Rows of a sweep's record, from its arms and from what the studies hold of each trial."""

from __future__ import annotations

from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.run import RunConfig
from lorasweep.config.sweep import CONFIRM_ENDING
from lorasweep.record import ArmRow, ConfirmRow, TrialRow
from lorasweep.record import TrialState as RowState
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.space import describe_space

TURN_ATTRIBUTE = "lorasweep:turn"
"""`order`: how many trials the controller had handed out before it last handed out this one; `passed`: the rungs that
the trial may go on beyond. A trial without it is not the controller's."""
PAUSED_ATTRIBUTE = "lorasweep:paused_at"
"""Step of the evaluation after which the trial's run was last paused."""
LOSSES_ATTRIBUTE = "lorasweep:rung_losses"
"""Validation loss by rung, where rungs compare by it."""
RUN_ATTRIBUTE = "lorasweep:run"
"""The trial's run folder, relative to the sweep's."""
REASON_ATTRIBUTE = "lorasweep:reason"
INFEASIBLE_ATTRIBUTE = "lorasweep:infeasible"
SCORE_ATTRIBUTE = "lorasweep:score"
"""The best value of the trial's run. Optuna gives a trial that it does not count as complete the value of its last
evaluation."""
SAMPLER_ATTRIBUTE = "lorasweep:sampler"
"""State that a sampler set by `_target_` stores with each trial that it proposes."""
WINNER_ATTRIBUTE = "lorasweep:winner"
RUNS_FOLDER = "runs"
STATES: dict[TrialState, RowState] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
"""How a trial ended, in the words of a record; another one is running or paused."""
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
        steps=0 if config.method.name == "frozen" else config.trainer.max_steps,
        settings=dict(arm.settings),
        space=describe_space(arm.space),
        sampler=arm.driver.sampler.name,
        pruner=arm.driver.pruner.name,
        expanded_from=arm.expanded_from,
        expanded=dict(arm.expanded),
    )


def trial_row(arm: str, trial: FrozenTrial, *, is_paused: bool) -> TrialRow:
    """Returns the row of a trial of the search."""
    step = max(trial.intermediate_values, default=0)
    return TrialRow(
        arm=arm,
        number=trial.number,
        state="paused" if is_paused else row_state(trial),
        params=dict(trial.params),
        value=row_value(trial),
        run=run_name(arm, trial.number),
        reason=trial.user_attrs.get(REASON_ATTRIBUTE),
        step=step,
        last_value=trial.intermediate_values.get(step),
    )


def confirm_row(arm: str, trial: FrozenTrial, *, winner: int) -> ConfirmRow:
    """Returns the row of a trial of the confirm stage."""
    state = row_state(trial)
    assert state != "pruned"
    assert state != "paused"
    step = max(trial.intermediate_values, default=0)
    return ConfirmRow(
        arm=arm,
        trial=winner,
        seed=trial.params[SEED],
        state=state,
        run=confirm_run_name(arm, trial.number),
        value=row_value(trial),
        reason=trial.user_attrs.get(REASON_ATTRIBUTE),
        step=step,
        last_value=trial.intermediate_values.get(step),
    )


def row_value(trial: FrozenTrial) -> float | None:
    """Returns the score of a trial; None before it has one, and where it is infeasible."""
    infeasible = trial.user_attrs.get(INFEASIBLE_ATTRIBUTE)
    score: float | None = trial.user_attrs.get(SCORE_ATTRIBUTE)
    return None if infeasible else score


def row_state(trial: FrozenTrial) -> RowState:
    """Returns how a trial ended, in the words of a record; `running` where it has not."""
    return "infeasible" if trial.user_attrs.get(INFEASIBLE_ATTRIBUTE) else STATES.get(trial.state, "running")
