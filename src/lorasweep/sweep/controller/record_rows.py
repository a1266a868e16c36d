"""The rows of a sweep's record: one for each arm, each trial of the search and each run of the confirm stage."""

from __future__ import annotations

from typing import Any

from optuna.trial import FrozenTrial

from lorasweep.record import ArmRow, ConfirmRow, TrialRow
from lorasweep.sweep.controller.trial import (
    REASON_ATTRIBUTE,
    SCORE_ATTRIBUTE,
    SLOT_STEPS_ATTRIBUTE,
    read_state,
)
from lorasweep.sweep.definition.arms import CONFIRM_ENDING, Arm
from lorasweep.sweep.definition.space import describe_space

RUNS_FOLDER = "runs"
SETTING, SEED = "setting", "seed"
"""The parameters in the confirm stage: the number of the setting in its arm, and the new seed."""


def run_name(arm: str, number: int) -> str:
    """Returns the folder of a run of the search, relative to the sweep's folder."""
    return f"{RUNS_FOLDER}/{arm}-{number:04d}"


def confirm_name(arm: str, number: int) -> str:
    """Returns the folder of a run of the confirm stage. No arm's name ends in `CONFIRM_ENDING`."""
    return run_name(f"{arm}{CONFIRM_ENDING}", number)


def arm_row(arm: Arm) -> ArmRow:
    config = arm.corners[0]
    return ArmRow(
        name=arm.name,
        method=config.method.name,
        trials=arm.trials,
        steps=config.num_steps,
        settings=dict(arm.settings),
        space=describe_space(arm.space),
        sampler=arm.sweep_config.sampler.name,
        pruner=arm.sweep_config.pruner.name,
        confirm_each=arm.confirm_each,
    )


def trial_row(arm: str, trial: FrozenTrial, *, is_paused: bool) -> TrialRow:
    return TrialRow(
        arm=arm,
        number=trial.number,
        state="paused" if is_paused else read_state(trial),
        params=dict(trial.params),
        run=run_name(arm, trial.number),
        **_read_results(trial),
    )


def confirm_row(arm: str, subject: str, trial: FrozenTrial) -> ConfirmRow:
    """Returns the row of a run of the confirm stage."""
    state = read_state(trial)
    assert state != "pruned"  # the stage has no rungs
    assert state != "paused"
    return ConfirmRow(
        arm=arm,
        subject=subject,
        setting=trial.params[SETTING],
        seed=trial.params[SEED],
        state=state,
        run=confirm_name(arm, trial.number),
        **_read_results(trial),
    )


def _read_results(trial: FrozenTrial) -> dict[str, Any]:
    step = max(trial.intermediate_values, default=0)
    return {
        "value": None if read_state(trial) == "infeasible" else trial.user_attrs.get(SCORE_ATTRIBUTE),
        "reason": trial.user_attrs.get(REASON_ATTRIBUTE),
        "step": step,
        "last_value": trial.intermediate_values.get(step),
        "slot_steps": trial.user_attrs.get(SLOT_STEPS_ATTRIBUTE, 0.0),
    }
