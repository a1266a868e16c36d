"""Reads a sweep's folder: joins each trial with its run's record, and each subject with its runs of all stages.

A run that can't be read leaves its trial without a record and adds a sentence to `SweepData.problems`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasweep.config.data import ScoreMetric
from lorasweep.disk import is_running
from lorasweep.errors import RecordError
from lorasweep.record import (
    ArmRow,
    RunRecord,
    SettingRow,
    Subject,
    SweepRecord,
    Trial,
    TrialState,
    find_winner,
    get_run_folder,
    is_number,
    read_run,
    read_sweep,
)
from lorasweep.report.evidence.estimates import Estimate, Interval, estimate_means
from lorasweep.report.evidence.evidence import (
    Evidence,
    build_evidence,
    compare_settings,
    read_confirm_scores,
)
from lorasweep.report.evidence.verdicts import AnswerRow


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The best setting of a subject: that of a complete trial, or one that the search predicts."""

    params: dict[str, Any]
    """Swept keys (dotted) and their values."""
    score: float | None
    """On validation data: that of the trial, or the predicted one."""
    trial: int | None
    """Number of the trial in its arm; None if the setting is predicted, and no trial has tried it."""
    run: Trial | None = field(repr=False)
    """The run with this setting that is exported: of its complete confirm runs the best on validation data, by which
    the search chooses too. Test scores decide between settings, never between the seeds of one. Before the confirm
    stage the trial."""
    row: SettingRow | None = field(repr=False)
    """Its row in the sweep's record, with its expected regret; None before the confirm stage."""

    @property
    def is_predicted(self) -> bool:
        return self.trial is None

    @property
    def record(self) -> RunRecord | None:
        return self.run.record if self.run else None

    @property
    def follows_rate_law(self) -> bool:
        return self.run is not None and self.run.follows_rate_law

    @property
    def regret(self) -> float | None:
        """How much better the best setting is expected to be, in the unit of the search's metric."""
        return self.row.regret if self.row else None

    def get(self, key: str) -> Any:
        """Returns the value of a dotted key, swept or not; None if it is not known."""
        return self.params[key] if key in self.params or self.run is None else self.run.setting(key)

    def get_number(self, key: str) -> float | None:
        value = self.get(key)
        return value if is_number(value) else None


@dataclass(frozen=True, kw_only=True)
class SubjectResult:
    """A subject with its trials by number and its confirm runs by seed. Tables and figures have one entry for each."""

    subject: Subject
    row: ArmRow
    """The row of the subject's arm."""
    trials: tuple[Trial, ...]
    """The trials of the arm, or those with the subject's value."""
    best: Setting | None
    """The setting that was confirmed; before the confirm stage that of the best complete trial."""
    confirm_runs: tuple[Trial, ...]
    """The confirm runs of the setting that is confirmed now."""

    @property
    def name(self) -> str:
        return self.subject.name

    @property
    def arm(self) -> str:
        return self.row.name

    @property
    def search_score(self) -> float | None:
        """The score of `best` on validation data, or the predicted one; None if there is none."""
        return self.best.score if self.best else None

    def count(self, state: TrialState) -> int:
        return sum(trial.state == state for trial in self.trials)

    def cost(self, name: str) -> Any:
        """Returns a field of the best run's record, such as `wall_s`; None if there is no such record."""
        return getattr(self.best.record, name) if self.best and self.best.record else None


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """One sweep as the report reads it."""

    folder: Path
    record: SweepRecord
    subjects: tuple[SubjectResult, ...]
    problems: tuple[str, ...]
    """One sentence for each run that can't be read, and for each subject without all of its test scores."""
    evidence: Evidence
    """The results of the confirm stage; without scores if there was none."""
    other_means: Mapping[str, Estimate]
    """The mean test score of each subject by the metric that the verdicts are not about; empty without one."""
    retained: Mapping[str, tuple[AnswerRow, ...]]
    """By data set of `retain.data`: the change of each subject's score against the frozen base."""

    @cached_property
    def fixed_arms(self) -> frozenset[str]:
        """The arms whose settings are fixed beside an arm that searches the same method, such as those in use today."""
        searched = {row.method for row in self.record.arms if row.space}
        return frozenset(row.name for row in self.record.arms if not row.space and row.method in searched)

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial of the search, by arm and number."""
        return tuple(trial for row in self.record.arms for trial in self.list_trials(row.name))

    def list_trials(self, arm: str) -> list[Trial]:
        """Returns the trials of an arm, with all values of its `confirm_each` key, by number."""
        return sorted((trial for trial in self.record.trials if trial.arm == arm), key=lambda trial: trial.number)

    @property
    def confirm_runs(self) -> tuple[Trial, ...]:
        """Every run of the confirm stage of a setting that is confirmed now, by subject and seed."""
        return tuple(run for subject in self.subjects for run in subject.confirm_runs)

    @property
    def completing_command(self) -> str:
        """The command that leads to a complete sweep: `status` if a process runs it now, else a resume."""
        if is_running(self.folder):
            return f"lorasweep status {shlex.quote(str(self.folder))}"
        return f"lorasweep sweep --resume {shlex.quote(str(self.folder))}"

    @property
    def run_records(self) -> tuple[RunRecord, ...]:
        """The record of every trial whose record can be read."""
        return tuple(trial.record for trial in self.trials if trial.record)

    @property
    def tokens_trained(self) -> int:
        """The number of tokens that the runs of all stages trained on."""
        runs = (*self.record.trials, *self.record.confirm)  # with confirm runs of former settings
        return sum(run.record.tokens_trained for run in runs if run.record)

    @property
    def steps_saved(self) -> int:
        """The number of steps that stopped trials were planned to do and did not."""
        stopped = [trial.record for trial in self.trials if trial.record and trial.state == "stopped"]
        return sum(record.steps_planned - record.steps_done for record in stopped)

    @property
    def shown_metric(self) -> ScoreMetric:
        """The metric by which subjects are compared: that of the verdicts, or of the search if nothing is confirmed."""
        return self.record.verdict_metric if self.evidence.means else self.record.search_metric

    @property
    def other_metric(self) -> ScoreMetric | None:
        """The metric of `other_means`."""
        return next(iter(self.record.test_metrics[1:]), None)

    def find_arm(self, name: str) -> ArmRow | None:
        """Returns the row of an arm, or of the arm of a subject."""
        subjects = (one for one in self.subjects if name in (one.arm, one.name))
        return next((one.row for one in subjects), None)

    def find_subject(self, name: str | None) -> SubjectResult | None:
        """Returns the entry of a subject."""
        return next((one for one in self.subjects if one.name == name), None)

    def find_best_subject(self, arm: str) -> SubjectResult | None:
        """Returns the subject of an arm with the best search score; None if none has one."""
        known = [one for one in self.subjects if one.arm == arm and one.search_score is not None]
        return min(known, key=lambda one: self.record.search_metric.sign * (one.search_score or 0.0), default=None)

    @cached_property
    def swept_keys(self) -> tuple[str, ...]:
        """The dotted keys that any arm sweeps, in the order of the arms."""
        keys = [key for row in self.record.arms for key in row.space]
        return tuple(dict.fromkeys([*keys, *(key for trial in self.trials for key in trial.params)]))

    def find_score(self, one: SubjectResult) -> float | None:
        """Returns the score of a subject: on test data after a confirm stage, else that of the best complete trial."""
        if self.evidence.means:
            return mean.value if (mean := self.evidence.mean(one.name)) else None
        return one.search_score

    def best_score(self, method: str) -> float | None:
        """Returns the best search score of a method: `frozen` is the base model, `full` is full fine-tuning."""
        scores = [one.search_score for one in self.subjects if one.row.method == method]
        return self.record.search_metric.best(score for score in scores if score is not None)

    @property
    def longest_run(self) -> RunRecord | None:
        return max(self.run_records, key=lambda run: run.steps_planned, default=None)

    @property
    def num_train(self) -> int:
        """The number of training examples, or of blocks of text, of the longest run; 0 if that is not known."""
        return (self.longest_run.num_train if self.longest_run else None) or 0

    @cached_property
    def search_gain(self) -> float | None:
        """The gain of full fine-tuning, or else of the best arm, over the frozen base in the search; None if unknown.

        It is also None if test data do not show it, because shares of it mean nothing then.
        """
        methods = {row.method for row in self.record.arms} - {"frozen"}
        scores = [self.best_score(method) for method in ({"full"} & methods or methods)]
        base, best = self.best_score("frozen"), self.record.search_metric.best(x for x in scores if x is not None)
        gain = 0.0 if base is None or best is None else self.record.search_metric.sign * (base - best)
        return gain if gain > 0 and (self.evidence.gain or not self.evidence.means) else None

    @property
    def gain(self) -> float | None:
        """The gain by `shown_metric`: on test data if anything is confirmed, else in the search."""
        return self.evidence.gain if self.evidence.means else self.search_gain

    @property
    def search_margin(self) -> float | None:
        """The margin in the unit of the search's metric; None if it is not known."""
        if self.record.verdict_metric.name == self.record.search_metric.name:
            return self.evidence.margin
        margin = self.evidence.scale.margin
        return self.evidence.scale.find_margin(self.search_gain) if margin.is_share_of_gain else None

    def find_share(self, one: SubjectResult) -> tuple[float | None, Interval | None]:
        """Returns a subject's share of full fine-tuning's gain with its interval: on test data if it is confirmed."""
        if self.evidence.means:
            return self.evidence.shares.get(one.name, (None, None))
        return self.find_search_share(one.search_score), None

    def find_search_share(self, score: float | None) -> float | None:
        """Returns (base - score) / (base - full) in the search; None if it is not known."""
        base, gain = self.best_score("frozen"), self.search_gain
        if score is None or base is None or gain is None or self.best_score("full") is None:
            return None
        return self.record.search_metric.sign * (base - score) / gain


def load_sweep_data(folder: Path, record: SweepRecord | None = None) -> SweepData:
    """Reads a sweep's folder: its record, unless it is given, and the record of each of its runs.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    record = record or read_sweep(folder)
    # copies, because each trial gets its run's record
    record = replace(record, trials=[*map(replace, record.trials)], confirm=[*map(replace, record.confirm)])
    problems = [*_read_runs(record, folder)]
    subjects = [_build_subject(subject, row, record) for row in record.arms for subject in row.subjects]
    for one in subjects if record.confirm else ():
        missing, total = sum(not run.is_complete for run in one.confirm_runs), len(one.confirm_runs)
        if not total:
            problems.append(f"`{one.name}` has no score on test data.")
        elif missing:
            problems.append(f"{missing} of {total} confirm runs of `{one.name}` have no score on test data.")
    evidence = build_evidence(record, read_confirm_scores(record, folder))
    other_means: Mapping[str, Estimate] = {}
    for metric in record.test_metrics[1:]:
        scores = read_confirm_scores(record, folder, metric=metric.name)
        other_means, problems = estimate_means(scores), [*problems, *scores.problems]
    runs = [trial.record for trial in (*record.trials, *record.confirm) if trial.record]
    failed = [facts["problem"] for run in runs for facts in run.answers.values() if "problem" in facts]
    others = f" {len(failed) - 1} other scores of runs have such a problem." if len(failed) > 1 else ""
    problems += [f"{problem}{others}" for problem in failed[:1]]
    retained: dict[str, tuple[AnswerRow, ...]] = {}
    base = evidence.scale.base
    for row in record.retained:
        scores = read_confirm_scores(record, folder, retained=row)
        pairs = [(setting.subject, base) for setting in record.settings if base]
        judged: dict[str, Any] = {"metric": row.metric, "margin": record.retain_margin, "level": evidence.level}
        retained[row.name] = tuple(compare_settings("retained", pairs, scores, **judged))
        problems += [problem for problem in scores.problems if problem not in problems]
    return SweepData(
        folder=folder,
        record=record,
        subjects=tuple(subjects),
        problems=tuple(problems),
        evidence=evidence,
        other_means=other_means,
        retained=retained,
    )


def _read_runs(record: SweepRecord, folder: Path) -> Iterator[str]:
    """Sets the record of each trial and confirm run, and yields a sentence for each that can't be read."""
    for trial in (*record.trials, *record.confirm):
        try:
            trial.record = read_run(get_run_folder(folder, trial.run))
        except (RecordError, OSError) as error:
            if trial.state != "running":  # a run that begins has no record yet
                yield f"The run `{trial.run}` can't be read: {error}"
        trial.reason = trial.reason or (trial.record.reason if trial.record else None)


def _build_subject(subject: Subject, row: ArmRow, record: SweepRecord) -> SubjectResult:
    trials = [trial for trial in record.trials if trial.arm == row.name and trial.subject == subject.name]
    trials.sort(key=lambda trial: trial.number)
    runs = [run for run in record.confirm_runs if run.subject == subject.name]
    runs.sort(key=lambda run: run.seed or 0)
    chosen = next((one for one in record.settings if one.subject == subject.name), None)
    if chosen is None:
        tried = find_winner(trials, record=record)
    else:
        tried = next((trial for trial in trials if trial.number == chosen.trial), None)
    best = None
    run = find_winner([run for run in runs if run.record and is_number(run.search_score)], record=record) or tried
    if tried is not None:
        best = Setting(params=tried.params, score=tried.search_score, trial=tried.number, run=run, row=chosen)
    elif chosen is not None:
        best = Setting(params=chosen.params, score=chosen.score, trial=None, run=run, row=chosen)
    return SubjectResult(subject=subject, row=row, trials=tuple(trials), best=best, confirm_runs=tuple(runs))
