"""The Pareto front of score and cost, for a sweep with a second objective (`sweep.second_objective`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.sweep_data import ArmData, SweepData, TrialData
from lorasweep.selection import list_front
from lorasweep.wording import format_count, format_metric, format_score

COST_NAMES = {"trainable_params": "trainable parameters", "tokens_trained": "training tokens"}
"""The second objectives as people read them."""


@dataclass(frozen=True, kw_only=True)
class FrontTrial:
    """A trial on the Pareto front of its arm."""

    arm: str
    trial: int
    params: dict[str, Any]
    run: str
    """The run's folder, relative to the sweep's."""
    score: float
    """The best score on validation data in the search."""
    cost: float
    """The second objective."""
    select_mean: float | None
    """The mean score on validation data over the seeds of the select stage; None if the trial did not run there."""
    test_mean: float | None
    """The mean score on test data over the seeds of the confirm stage; None unless the trial is its arm's winner."""
    test_interval: Interval | None
    trainable_params: int | None
    wall_s: float | None
    """Seconds of the run in the search. A measured time is not repeatable, so the search did not see it."""
    is_on_joint_front: bool
    """Whether the trial is also on the front of all arms together."""


@dataclass(frozen=True, kw_only=True)
class Front:
    """The Pareto fronts of a sweep's arms."""

    objective: str
    """The second objective as people read it."""
    trials: tuple[FrontTrial, ...]
    """The trials on the front of their arm, by rising cost; without trials that cost nothing."""
    sentence: str


def find_front(data: SweepData) -> Front | None:
    """Returns the Pareto fronts; None for a sweep with one objective, or without a complete trial that has a cost."""
    joint = [trial for trial in list_front(_list_paid(data.trials), record=data.record) if trial.value is not None]
    if not joint:
        return None
    on_joint = {trial.run for trial in joint}
    found = [
        _describe_trial(trial, arm, data, is_on_joint_front=trial.run in on_joint)
        for arm in data.arms
        for trial in list_front(_list_paid(arm.trials), record=data.record)
    ]
    objective, metric = COST_NAMES[data.record.second_objective], format_metric(data.record.metric)
    ends = [
        f"{format_count(trial.second_value)} ({format_score(trial.value)}, `{trial.name}`)"
        for trial in (joint[-1], joint[0])
    ]
    where = f"one trial: {ends[0]}" if len(joint) == 1 else f"{len(joint)} trials, from {ends[0]} to {ends[1]}"
    return Front(
        objective=objective,
        trials=tuple(sorted(found, key=lambda one: (one.cost, data.sign * one.score))),
        sentence=f"The Pareto front of {metric} and {objective} on validation data has {where}.",
    )


def _list_paid(trials: tuple[TrialData, ...]) -> list[TrialData]:
    """Returns the trials that cost something. The frozen base is always on the front, and says nothing."""
    return [trial for trial in trials if trial.second_value]


def _describe_trial(trial: TrialData, arm: ArmData, data: SweepData, *, is_on_joint_front: bool) -> FrontTrial:
    confirmed = data.evidence.arm(arm.name) if trial is arm.best else None
    assert trial.value is not None
    assert trial.second_value is not None
    return FrontTrial(
        arm=arm.name,
        trial=trial.number,
        params=trial.params,
        run=trial.run,
        score=trial.value,
        cost=trial.second_value,
        select_mean=arm.candidates.get(trial.number),
        test_mean=confirmed.mean if confirmed else None,
        test_interval=confirmed.interval if confirmed else None,
        trainable_params=trial.record.trainable_params if trial.record else None,
        wall_s=trial.record.wall_s if trial.record else None,
        is_on_joint_front=is_on_joint_front,
    )
