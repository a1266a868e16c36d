"""The rows of a sweep's record: one for each arm, each trial of the search and each run of the confirm stage."""

from __future__ import annotations

from typing import Any

from optuna.trial import FrozenTrial

from lorasweep.record import ArmRow, Trial, name_run, name_subject
from lorasweep.sweep.controller.trial import (
    REASON_ATTRIBUTE,
    SCORE_ATTRIBUTE,
    SLOT_STEPS_ATTRIBUTE,
    read_state,
)
from lorasweep.sweep.definition.arms import Arm
from lorasweep.sweep.definition.space import describe_space

RUNS_FOLDER = "runs"
SETTING, SEED = "setting", "seed"
"""The parameters in the confirm stage: the number of the setting in its arm, and the new seed."""


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


def build_search_trial(arm: Arm, trial: FrozenTrial, *, is_paused: bool) -> Trial:
    return Trial(
        arm=arm.name,
        subject=name_subject(arm.name, arm.confirm_each, trial.params.get(arm.confirm_each or "")),
        number=trial.number,
        state="paused" if is_paused else read_state(trial),
        params=dict(trial.params),
        run=name_run("search", arm.name, trial.number),
        **_read_results(trial),
    )


def build_confirm_trial(arm: str, subject: str, params: dict[str, Any], trial: FrozenTrial) -> Trial:
    return Trial(
        stage="confirm",
        arm=arm,
        subject=subject,
        number=trial.number,
        state=read_state(trial),
        params=params,
        setting_number=trial.params[SETTING],
        seed=trial.params[SEED],
        run=name_run("confirm", arm, trial.number),
        **_read_results(trial),
    )


def _read_results(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "value": None if read_state(trial) == "infeasible" else trial.user_attrs.get(SCORE_ATTRIBUTE),
        "reason": trial.user_attrs.get(REASON_ATTRIBUTE),
        "values": dict(trial.intermediate_values),
        "slot_steps": trial.user_attrs.get(SLOT_STEPS_ATTRIBUTE, 0.0),
    }
