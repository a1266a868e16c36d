"""Joins the records of one sweep: each trial with its run's record and validation curve, each arm with its trials.

Comes after `record`, before `summary` and the figures. A run folder that is missing or damaged gives a sentence in
place of an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasweep.errors import RecordError
from lorasweep.record import (
    SWEEP_FILE,
    ArmRow,
    RunRecord,
    SweepRecord,
    TrialRow,
    TrialState,
    best_trial,
    read_sweep,
)
from lorasweep.report.evidence import Evidence, weigh_evidence
from lorasweep.report.reruns import Rerun, join_reruns, score_reruns
from lorasweep.report.runs import Curve, as_shown, finite_number, misfits, read_curve, read_usable_run, value_of


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a sweep with its run's record and curve."""

    arm: str
    method: str
    number: int
    state: TrialState
    params: dict[str, Any]
    """Swept keys (dotted) and their values."""
    value: float | None
    """Best finite value of the sweep's metric."""
    run: str
    """The run's folder, relative to the sweep's."""
    reason: str | None
    record: RunRecord | None
    """None where the run's record can't be read; `problem` says why."""
    curve: Curve
    problem: str | None

    @property
    def is_complete(self) -> bool:
        """Whether the trial ran to its end and has a score, so that it may be an arm's best."""
        return self.state == "complete" and self.value is not None

    @property
    def is_stopped_early(self) -> bool:
        """Whether a stopping rule ended the trial, or paused it until it may go on; its values are partial."""
        return self.state in ("paused", "pruned")

    def setting(self, key: str) -> Any:
        """Returns the value of a dotted key: the swept one, else the one in the run's configuration, else None."""
        if key in self.params:
            return self.params[key]
        value: Any = self.record.config if self.record else {}
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def number_at(self, key: str) -> float | None:
        """Returns a setting that is a finite number, else None."""
        return finite_number(self.setting(key))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm with its trials in the order of their numbers."""

    row: ArmRow
    trials: tuple[Trial, ...]
    best: Trial | None
    """The best of the complete trials, the earlier one of equals; None where no trial is complete."""
    reruns: tuple[Rerun, ...] = ()
    """Reruns of the confirm stage, by seed."""

    @property
    def name(self) -> str:
        """The arm's name."""
        return self.row.name

    def count(self, state: TrialState) -> int:
        """Returns how many trials are in that state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def winner(self) -> Trial | None:
        """The trial that the confirm stage ran again; the best where there was no such stage."""
        confirmed = {rerun.trial for rerun in self.reruns}
        return next((trial for trial in self.trials if trial.number in confirmed), self.best)


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """One sweep as the report reads it."""

    folder: Path
    record: SweepRecord
    arms: tuple[Arm, ...]
    problems: tuple[str, ...]
    """A sentence for each run that can't be read and each trial that belongs to no arm."""
    evidence: Evidence
    """Results of the confirm stage; empty if there was none."""

    @property
    def reruns(self) -> tuple[Rerun, ...]:
        """Every rerun of the confirm stage, by arm and seed."""
        return tuple(rerun for arm in self.arms for rerun in arm.reruns)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial, by arm and number."""
        return tuple(trial for arm in self.arms for trial in arm.trials)

    @property
    def run_records(self) -> tuple[RunRecord, ...]:
        """The record of every run that can be read."""
        return tuple(trial.record for trial in self.trials if trial.record)

    @property
    def tokens_trained(self) -> int:
        """Tokens that trials and reruns trained on."""
        return sum(record.tokens_trained for record in (*self.run_records, *(r.record for r in self.reruns)) if record)

    @property
    def steps_saved_by_pruning(self) -> int:
        """Steps planned but not done, over trials that are pruned or paused."""
        stopped = [trial.record for trial in self.trials if trial.record and trial.is_stopped_early]
        return sum(record.steps_planned - record.steps_done for record in stopped)

    @property
    def sign(self) -> int:
        """1 where lower scores are better, else -1: `sign * score` is always to be minimized."""
        return 1 if self.record.direction == "minimize" else -1

    @cached_property
    def swept_keys(self) -> tuple[str, ...]:
        """Dotted keys that any arm sweeps, in the order of the arms."""
        keys = [key for arm in self.arms for key in arm.row.space]
        return tuple(dict.fromkeys([*keys, *(key for trial in self.trials for key in trial.params)]))

    def best_arm(self, method: str) -> Arm | None:
        """Returns the arm of that method with the best score, or None where none has one."""
        scored = [arm for arm in self.arms if arm.row.method == method and arm.best]
        best = best_trial([arm.best for arm in scored if arm.best], direction=self.record.direction)
        return next((arm for arm in scored if arm.best is best), None)

    def score_of(self, method: str) -> float | None:
        """Returns the best score among the arms of that method: `frozen` is the base, `full` full fine-tuning."""
        arm = self.best_arm(method)
        return arm.best.value if arm and arm.best else None

    def share_of_full_gain(self, score: float | None) -> float | None:
        """Returns (base - score) / (base - full), or None where one is missing or full fine-tuning gained nothing."""
        base, full = self.score_of("frozen"), self.score_of("full")
        if score is None or base is None or full is None or self.sign * (base - full) <= 0:
            return None
        return (base - score) / (base - full)


def load_sweep_data(folder: Path) -> SweepData:
    """Reads a sweep's folder: its record, and per trial the run's record and validation curve.

    Raises:
        RecordError: The folder is not a sweep or its record is damaged.
    """
    record = read_sweep(folder)
    rows: list[SweepRecord | ArmRow | TrialRow] = [record, *record.arms, *record.trials]
    for row in rows:
        _require_kinds(row, folder / SWEEP_FILE)
    record = as_shown(record)
    record.arms, record.trials = [as_shown(row) for row in record.arms], [as_shown(row) for row in record.trials]
    record.confirm = [as_shown(row) for row in record.confirm]
    sign = 1 if record.direction == "minimize" else -1
    reruns, rerun_problems = join_reruns(record, folder)
    arms = tuple(_join_arm(row, record, folder, reruns) for row in record.arms)
    scores, score_problems = score_reruns(reruns, record, folder)
    names = {row.name for row in record.arms}
    strays = [_stray(trial) for trial in record.trials if trial.arm not in names]
    foreign = [sentence for arm in arms if (sentence := _foreign_metric(arm, record.metric))]
    trial_problems = [trial.problem for arm in arms for trial in arm.trials if trial.problem]
    return SweepData(
        folder=folder,
        record=record,
        arms=arms,
        problems=(*strays, *foreign, *score_problems, *trial_problems, *rerun_problems),
        evidence=weigh_evidence(scores, [(arm.name, arm.row.method) for arm in arms], sign=sign),
    )


def _stray(row: TrialRow) -> str:
    return f"Trial {row.number} belongs to arm `{row.arm}`, which is not listed."


def _require_kinds(row: SweepRecord | ArmRow | TrialRow, path: Path) -> None:
    wrong = misfits(row)
    if wrong:
        raise RecordError(
            f"`{wrong[0]}` of a {type(row).__name__} must be of its declared type, "
            f"but got {getattr(row, wrong[0])!r} in {str(path)!r}. Restore the file."
        )


def _foreign_metric(arm: Arm, metric: str) -> str | None:
    records = [*(trial.record for trial in arm.trials), *(rerun.record for rerun in arm.reruns)]
    foreign = sorted({run.metric for run in records if run} - {metric})
    if not foreign:
        return None
    named = ", ".join(f"`{name}`" for name in foreign)
    return f"Runs of `{arm.name}` are scored by {named} and not by `{metric}` like the sweep: they are not compared."


def _join_arm(row: ArmRow, record: SweepRecord, folder: Path, reruns: tuple[Rerun, ...]) -> Arm:
    mine = sorted((trial for trial in record.trials if trial.arm == row.name), key=lambda trial: trial.number)
    trials = tuple(_join_trial(trial, row, record.metric, folder) for trial in mine)
    own = tuple(rerun for rerun in reruns if rerun.arm == row.name)
    return Arm(row=row, trials=trials, best=best_trial(trials, direction=record.direction), reruns=own)


def _join_trial(row: TrialRow, arm: ArmRow, metric: str, folder: Path) -> Trial:
    run, problem = read_usable_run(folder, row.run)
    return Trial(
        arm=row.arm,
        method=arm.method,
        number=row.number,
        state=row.state,
        params=row.params,
        value=value_of(row.value, run, metric),
        run=row.run,
        reason=row.reason or (run.reason if run else None),
        record=run,
        curve=read_curve(folder / row.run, metric) if run else (),
        problem=problem,
    )
