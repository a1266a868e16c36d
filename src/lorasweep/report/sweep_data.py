"""Reads a sweep's folder: joins each trial with its run's record, and each subject with its runs of all stages.

A subject is an arm, or one value of its `confirm_each` key. Tables and figures have one entry per subject.

A run that can't be read leaves its trial without a record and adds a sentence to `SweepData.problems`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasweep.config.ranges import is_number
from lorasweep.config.sweep import parse_margin
from lorasweep.errors import RecordError
from lorasweep.record import (
    SWEEP_FILE,
    ArmRow,
    ConfirmRow,
    RunRecord,
    SettingRow,
    SweepRecord,
    TrialRow,
    TrialState,
    measure_occupancy,
    name_subject,
    read_run,
    read_steps,
    read_sweep,
)
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.evidence.evidence import Evidence, build_evidence, find_metric_range, read_confirm_scores
from lorasweep.selection import find_winner, list_confirm_rows
from lorasweep.wording import format_setting

RANK, ALPHA, LR = "method.rank", "method.alpha", "optim.lr"
MULTIPLIER = "method.alpha_over_rank"
"""The key of α/r in a sweep that searches it."""

STATES: tuple[TrialState, ...] = ("complete", "paused", "pruned", "failed", "infeasible", "running")
"""The states of a trial, in the order of the report."""

Curve = tuple[tuple[int, float], ...]
"""Validation scores of one run: pairs of step and value, by step."""


@dataclass(frozen=True, kw_only=True)
class TrialData:
    """One trial of the search, one confirm run, or the setting that a subject is confirmed with.

    The setting of a subject is one of its complete trials, or a predicted setting that no trial has.
    """

    arm: str
    subject: str
    number: int | None
    """The trial's number in its arm; None for a confirm run and for a predicted setting."""
    seed: int | None
    """The seed of a confirm run; None in the search."""
    state: TrialState
    params: dict[str, Any]
    """The swept keys (dotted) and their values; empty for a confirm run."""
    value: float | None
    """The best finite validation score, or the predicted one; for a confirm run the score on test data."""
    run: str
    """The run's folder, relative to the sweep's. A predicted setting has that of its first complete confirm run; the
    text is empty before there is one."""
    reason: str | None
    record: RunRecord | None
    """None if the run's record can't be read."""
    curve: Curve

    @property
    def name(self) -> str:
        if self.seed is not None:
            return f"{self.subject}, seed {self.seed}"
        return f"{self.subject}, predicted" if self.number is None else f"{self.arm} {self.number}"

    @property
    def is_predicted(self) -> bool:
        """Whether the search's model chose the setting, and no trial has it."""
        return self.number is None and self.seed is None

    @property
    def trains(self) -> bool:
        """Whether the run trained anything, unlike the frozen base."""
        return self.record is not None and self.record.trainable_params > 0

    @property
    def is_complete(self) -> bool:
        """Whether the trial finished and has a score, so that it may be its arm's best."""
        return self.state == "complete" and self.value is not None

    @property
    def is_stopped_early(self) -> bool:
        """Whether a stopping rule pruned or paused the trial, so that its score is of fewer steps."""
        return self.state in ("paused", "pruned")

    def setting(self, key: str) -> Any:
        """Returns the value of a dotted key: the swept value, else the one in the run's configuration, else None."""
        if key in self.params:
            return self.params[key]
        value: Any = self.record.config if self.record else {}
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def numeric_setting(self, key: str) -> float | None:
        """Returns the value of a dotted key if it is a finite number, else None."""
        return finite_number(self.setting(key))


@dataclass(frozen=True, kw_only=True)
class ArmData:
    """A subject, or a whole arm, with its trials by number and its confirm runs by seed."""

    arm: str
    """The name of the arm in the sweep file."""
    row: ArmRow
    """The arm's row. For one value of `confirm_each` it has the subject's name, and the value in `settings` instead of
    the key in `space`; `trials` is the number of trials of all values."""
    trials: tuple[TrialData, ...]
    """All trials of the arm, or those with the subject's value."""
    setting: SettingRow | None
    """The setting that the confirm stage trains; None before that stage, and for an arm with several subjects."""
    best: TrialData | None
    """The trial or the predicted setting that was confirmed; before the confirm stage the best complete trial, the
    earlier one of equals. None if there is neither."""
    so_far: TrialData | None
    """The best trial that was paused or pruned, if no trial is complete."""
    confirm_runs: tuple[TrialData, ...]
    """The confirm runs of the setting that is confirmed now."""
    occupancy: float | None
    """Share of the slots of packs that trained, in all stages; None if no run trained in a pack."""

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def key(self) -> str | None:
        """The `confirm_each` key whose value the subject is; None for an arm."""
        key = self.row.confirm_each
        return None if key in self.row.space else key

    def count(self, state: TrialState) -> int:
        return sum(trial.state == state for trial in self.trials)

    def tried_settings(self, key: str) -> tuple[str, ...]:
        """Returns the different values of a swept key in complete trials, as text with three digits."""
        found = [trial.params[key] for trial in self.trials if trial.is_complete and key in trial.params]
        return tuple(dict.fromkeys(map(format_setting, found)))

    @property
    def untried(self) -> dict[str, tuple[str, ...]]:
        """The choices of each swept key that no complete trial has; without keys that have no complete trial at all."""
        choices = {
            key: [format_setting(choice) for choice in space]
            for key, space in self.row.space.items()
            if isinstance(space, list)
        }
        tried = {key: self.tried_settings(key) for key in choices}
        missing = {key: tuple(one for one in choices[key] if one not in tried[key]) for key in choices if tried[key]}
        return {key: values for key, values in missing.items() if values}

    def describe_states(self) -> str:
        """Returns how many trials are in each state: `9 complete, 7 pruned`."""
        return ", ".join(f"{count} {state}" for state in STATES if (count := self.count(state))) or "none"

    def cost(self, name: str) -> Any:
        """Returns a field of the best run's record, such as `wall_s`; None if there is no such record."""
        return getattr(self.best.record, name) if self.best and self.best.record else None


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """One sweep as the report reads it."""

    folder: Path
    record: SweepRecord
    arms: tuple[ArmData, ...]
    """The subjects: one entry for each arm, or for each value of an arm's `confirm_each` key."""
    searches: tuple[ArmData, ...]
    """One entry for each arm, with all its trials. Without `confirm_each` it is the entry in `arms`."""
    former_runs: tuple[TrialData, ...]
    """The confirm runs of former settings, which others replaced after the sweep grew."""
    problems: tuple[str, ...]
    """One sentence for each run that can't be read, and for each subject without all of its test scores."""
    evidence: Evidence
    """The results of the confirm stage; empty if there was none."""

    @property
    def trials(self) -> tuple[TrialData, ...]:
        """Every trial, by arm and number."""
        return tuple(trial for arm in self.searches for trial in arm.trials)

    @property
    def confirm_runs(self) -> tuple[TrialData, ...]:
        """Every run of the confirm stage of a setting that is confirmed now, by subject and seed."""
        return tuple(rerun for arm in self.arms for rerun in arm.confirm_runs)

    @property
    def run_records(self) -> tuple[RunRecord, ...]:
        """The record of every trial whose record can be read."""
        return tuple(trial.record for trial in self.trials if trial.record)

    @property
    def tokens_trained(self) -> int:
        """The number of tokens that the runs of all stages trained on."""
        runs = (*self.trials, *self.confirm_runs, *self.former_runs)
        return sum(run.record.tokens_trained for run in runs if run.record)

    @property
    def steps_saved_by_pruning(self) -> int:
        """The number of steps that pruned and paused trials were planned to do and did not."""
        stopped = [trial.record for trial in self.trials if trial.record and trial.is_stopped_early]
        return sum(record.steps_planned - record.steps_done for record in stopped)

    @property
    def sign(self) -> int:
        """1 if lower scores are better, else -1, so that a lower `sign * score` is always better."""
        return 1 if self.record.direction == "minimize" else -1

    @property
    def metric_range(self) -> Interval:
        """The lowest and the highest possible value of the metric."""
        return find_metric_range(self.record)

    @property
    def example_groups(self) -> str | None:
        """The name of the groups of test examples, such as `documents`; None if each example is a group."""
        is_grouped = self.evidence.num_groups != self.evidence.num_examples
        return name_example_groups(self.confirm_runs) if is_grouped else None

    def find_arm(self, subject: str | None) -> ArmData | None:
        """Returns the entry of a subject."""
        return next((arm for arm in self.arms if arm.name == subject), None)

    @cached_property
    def swept_keys(self) -> tuple[str, ...]:
        """The dotted keys that any arm sweeps, in the order of the arms."""
        keys = [key for arm in self.searches for key in arm.row.space]
        return tuple(dict.fromkeys([*keys, *(key for trial in self.trials for key in trial.params)]))

    def best_score(self, method: str) -> float | None:
        """Returns the best search score of a method: `frozen` is the base model, `full` is full fine-tuning."""
        best = [arm.best for arm in self.arms if arm.row.method == method and arm.best]
        return min(
            (trial.value for trial in best if trial.value is not None), key=lambda v: self.sign * v, default=None
        )

    @property
    def full_gain(self) -> float | None:
        """Full fine-tuning's gain over the frozen base in the search; None if it is not known or not positive."""
        base, full = self.best_score("frozen"), self.best_score("full")
        gain = 0.0 if base is None or full is None else self.sign * (base - full)
        return gain if gain > 0 else None

    @property
    def margin_share(self) -> float:
        """The margin as a share of full fine-tuning's gain; 0 if it is in the metric's unit."""
        margin = parse_margin(self.record.margin)
        return margin.value if margin.is_share_of_gain else 0.0

    def full_gain_share_of_arm(self, arm: ArmData) -> tuple[float | None, Interval | None]:
        """Returns an arm's share of full fine-tuning's gain with its interval: on test data after a confirm stage."""
        if self.evidence.subjects:
            confirmed = self.evidence.subject(arm.name)
            return (confirmed.share_of_full_gain, confirmed.share_interval) if confirmed else (None, None)
        return self.share_of_full_gain(arm.best.value if arm.best else None), None

    def share_of_full_gain(self, score: float | None) -> float | None:
        """Returns (base - score) / (base - full), or None if a score is missing or full fine-tuning gained nothing."""
        base, gain = self.best_score("frozen"), self.full_gain
        return None if score is None or base is None or gain is None else self.sign * (base - score) / gain


def finite_number(value: Any) -> float | None:
    """Returns the value if it is a finite number, else None."""
    return value if is_number(value) else None


def name_example_groups(confirm_runs: Iterable[TrialData]) -> str | None:
    """Returns the name of the groups of test examples, such as `documents`; None without confirm runs."""
    run = next((run for run in confirm_runs if run.record), None)
    if run is None:
        return None
    if column := run.setting("data.group"):
        return f"groups of `{column}`"
    return "prompts" if run.setting("data.name") == "chat" else "documents"


def load_sweep_data(folder: Path) -> SweepData:
    """Reads a sweep's folder.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    record = read_sweep(folder)
    _check_questions(record, folder)
    problems: list[str] = []
    searches, arms = [], []
    for row in record.arms:
        trials, runs, occupancy = _read_arm_runs(row, record, folder, problems)
        subjects = [
            _build_arm(subject_row, trials, runs, record, arm=row.name, occupancy=occupancy)
            for subject_row in _list_subject_rows(row)
        ]
        arms += subjects
        is_split = row.confirm_each is not None
        whole = _build_arm(row, trials, runs, record, arm=row.name, occupancy=occupancy) if is_split else subjects[0]
        searches.append(whole)
    if record.confirm:
        problems += [sentence for arm in arms if (sentence := _describe_missing_scores(arm))]
    current = [row for arm in arms for row in list_confirm_rows(arm.name, record=record)]
    groups = name_example_groups(run for arm in arms for run in arm.confirm_runs)
    return SweepData(
        folder=folder,
        record=record,
        arms=tuple(arms),
        searches=tuple(searches),
        former_runs=tuple(
            _join_run(row, record.metric, folder, problems) for row in record.confirm if row not in current
        ),
        problems=tuple(problems),
        evidence=build_evidence(record, read_confirm_scores(record, folder), groups=groups),
    )


def _check_questions(record: SweepRecord, folder: Path) -> None:
    is_ascending = record.looks == sorted(set(record.looks)) and all(look > 0 for look in record.looks)
    if not is_ascending or any(one.reference is None and one.name != "smallest" for one in record.questions):
        raise RecordError(
            f"{str(folder / SWEEP_FILE)!r} is damaged: `looks` must be ascending numbers of seeds, and each of "
            "`questions` but `smallest` must have a `reference`."
        )


def _list_subject_rows(arm: ArmRow) -> list[ArmRow]:
    """Returns the arm's row, or one for each value of its `confirm_each` key, numbers ascending."""
    key = arm.confirm_each
    values = arm.space.get(key) if key else None
    if key is None or not isinstance(values, list):
        return [arm]
    space = {other: choices for other, choices in arm.space.items() if other != key}
    return [
        replace(arm, name=name_subject(arm.name, key, value), settings=arm.settings | {key: value}, space=space)
        for value in (sorted(values) if all(map(is_number, values)) else values)
    ]


def _read_arm_runs(
    arm: ArmRow, record: SweepRecord, folder: Path, problems: list[str]
) -> tuple[list[TrialData], list[TrialData], float | None]:
    """Returns an arm's trials by number, its current confirm runs by seed, and the share of slots that trained."""
    subjects = [row.name for row in _list_subject_rows(arm)]
    rows = sorted((row for row in record.trials if row.arm == arm.name), key=lambda row: row.number)
    confirm_rows = [row for subject in subjects for row in list_confirm_rows(subject, record=record)]
    trials = []
    for row in rows:
        value = row.params.get(arm.confirm_each) if arm.confirm_each else None
        subject = name_subject(arm.name, arm.confirm_each, value)
        trials.append(_join_trial(row, record.metric, folder, problems, subject=subject))
    runs = [_join_run(row, record.metric, folder, problems) for row in sorted(confirm_rows, key=lambda row: row.seed)]
    return trials, runs, measure_occupancy([*rows, *(row for row in record.confirm if row.arm == arm.name)])


def _build_arm(
    row: ArmRow,
    trials: Sequence[TrialData],
    runs: Sequence[TrialData],
    record: SweepRecord,
    *,
    arm: str,
    occupancy: float | None,
) -> ArmData:
    """Returns the entry of a subject, or of a whole arm if `row` has the arm's name."""
    is_whole = row.name == arm
    mine = [trial for trial in trials if is_whole or trial.subject == row.name]
    confirm_runs = tuple(run for run in runs if is_whole or run.subject == row.name)
    setting = next((one for one in record.settings if one.subject == row.name), None)
    winner = find_winner(mine, record=record)
    if setting is not None:
        tried = next((trial for trial in mine if trial.number == setting.trial), None)
        winner = tried or _build_predicted(setting, confirm_runs)
    sign = 1 if record.direction == "minimize" else -1
    stopped = [trial for trial in mine if trial.is_stopped_early and trial.value is not None]
    so_far = min(stopped, key=lambda trial: sign * (trial.value or 0.0), default=None)
    return ArmData(
        arm=arm,
        row=row,
        trials=tuple(mine),
        setting=setting,
        best=winner,
        so_far=None if any(trial.is_complete for trial in mine) else so_far,
        confirm_runs=confirm_runs,
        occupancy=occupancy,
    )


def _build_predicted(setting: SettingRow, confirm_runs: Iterable[TrialData]) -> TrialData:
    """Returns a setting that no trial has, with the record and the curve of its first complete confirm run."""
    run = next((run for run in confirm_runs if run.is_complete and run.record), None)
    return TrialData(
        arm=setting.arm,
        subject=setting.subject,
        number=None,
        seed=None,
        state="complete",
        params=setting.params,
        value=finite_number(setting.score),
        run=run.run if run else "",
        reason=None,
        record=run.record if run else None,
        curve=run.curve if run else (),
    )


def _join_trial(row: TrialRow, metric: str, folder: Path, problems: list[str], *, subject: str) -> TrialData:
    run = _read_run(row, folder, problems)
    return TrialData(
        arm=row.arm,
        subject=subject,
        number=row.number,
        seed=None,
        state=row.state,
        params=row.params,
        value=finite_number(row.value),
        run=row.run,
        reason=row.reason or (run.reason if run else None),
        record=run,
        curve=_read_curve(folder / row.run, metric) if run else (),
    )


def _join_run(row: ConfirmRow, metric: str, folder: Path, problems: list[str]) -> TrialData:
    run = _read_run(row, folder, problems)
    return TrialData(
        arm=row.arm,
        subject=row.subject,
        number=None,
        seed=row.seed,
        state=row.state,
        params={},
        value=finite_number(row.value),
        run=row.run,
        reason=row.reason or (run.reason if run else None),
        record=run,
        curve=_read_curve(folder / row.run, metric) if run else (),
    )


def _read_run(row: TrialRow | ConfirmRow, folder: Path, problems: list[str]) -> RunRecord | None:
    try:
        return read_run(folder / row.run)
    except (RecordError, OSError) as error:
        if row.state != "running":  # a run that begins has no record yet
            problems.append(f"The run `{row.run}` can't be read: {error}")
        return None


def _read_curve(run: Path, metric: str) -> Curve:
    values: dict[int, float] = {}
    try:
        for row in read_steps(run, having='"validation"'):
            value = finite_number(row.get("validation", {}).get(metric))
            if value is not None:
                # A resumed run writes the steps after its checkpoint again. The later row counts.
                values[row["step"]] = value
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(sorted(values.items()))


def _describe_missing_scores(arm: ArmData) -> str | None:
    """Returns a sentence if the arm has no score on test data, or fewer scores than confirm runs."""
    scored, total = sum(rerun.is_complete for rerun in arm.confirm_runs), len(arm.confirm_runs)
    if not scored:
        return f"`{arm.name}` has no score on test data."
    return (
        None if scored == total else f"`{arm.name}` has scores on test data from {scored} of its {total} confirm runs."
    )
