"""Reads a sweep's folder: joins each trial with its run's record, and each arm with its runs of all stages.

A run that can't be read leaves its trial without a record and adds a sentence to `SweepData.problems`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasweep.config.data import METRIC_RANGES
from lorasweep.config.ranges import is_number
from lorasweep.config.sweep import parse_margin
from lorasweep.errors import RecordError
from lorasweep.record import (
    TEST_SCORES_FILE,
    ArmRow,
    ConfirmRow,
    RunRecord,
    SweepRecord,
    TrialRow,
    TrialState,
    measure_occupancy,
    read_run,
    read_steps,
    read_sweep,
)
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.evidence.scores import (
    UNBOUNDED,
    ConfirmScores,
    ExampleScores,
    RunKey,
    build_scores,
    read_examples,
)
from lorasweep.report.evidence.verdicts import Evidence, compare_arms
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
    """One trial of the search, or one confirm run of a trial, with its run's record."""

    arm: str
    number: int
    """The trial's number in its arm; a confirm run has the number of its trial."""
    seed: int | None
    """The seed of a confirm run; None in the search."""
    state: TrialState
    params: dict[str, Any]
    """The swept keys (dotted) and their values; empty for a confirm run."""
    value: float | None
    """The best finite validation score; for a confirm run the score on test data."""
    run: str
    """The run's folder, relative to the sweep's."""
    reason: str | None
    record: RunRecord | None
    """None if the run's record can't be read."""
    curve: Curve

    @property
    def name(self) -> str:
        return f"{self.arm} {self.number}" if self.seed is None else f"{self.arm} {self.number}, seed {self.seed}"

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
    """One arm with its trials by number and its confirm runs by seed."""

    row: ArmRow
    trials: tuple[TrialData, ...]
    best: TrialData | None
    """The winner, which is the best complete trial. If two are equal, the earlier trial wins. None if no trial is
    complete."""
    confirm_runs: tuple[TrialData, ...]
    """The runs of the winner in the confirm stage."""
    former_runs: tuple[TrialData, ...]
    """The runs in the confirm stage of a former winner, which another trial replaced after the sweep grew."""
    occupancy: float | None
    """Share of the slots of packs that trained, in all stages; None if no run trained in a pack."""

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def harness(self) -> dict[str, float]:
        """Scores by lm-evaluation-harness, as `TASK/METRIC`: means over the complete confirm runs."""
        runs = [run.record.harness for run in self.confirm_runs if run.is_complete and run.record]
        names = dict.fromkeys(name for run in runs for name in run if not name.split(",")[0].endswith("_stderr"))
        found = {name: [run[name] for run in runs if finite_number(run.get(name)) is not None] for name in names}
        return {name: sum(values) / len(values) for name, values in found.items() if values}

    @property
    def rank(self) -> float | None:
        """The rank of an arm that has one rank; None if it has none or sweeps it."""
        if RANK in self.row.space:
            return None
        rank = finite_number(self.row.settings.get(RANK))
        if rank is None and self.best:
            rank = self.best.numeric_setting(RANK)
        return float(rank) if rank is not None and rank > 0 else None

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
        """Returns a field of the best trial's run record, such as `wall_s`; None if there is no such record."""
        return getattr(self.best.record, name) if self.best and self.best.record else None


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """One sweep as the report reads it."""

    folder: Path
    record: SweepRecord
    arms: tuple[ArmData, ...]
    problems: tuple[str, ...]
    """One sentence for each run or file that can't be read, and for each arm without all of its test scores."""
    evidence: Evidence
    """The results of the confirm stage; empty if there was none."""

    @property
    def trials(self) -> tuple[TrialData, ...]:
        """Every trial, by arm and number."""
        return tuple(trial for arm in self.arms for trial in arm.trials)

    @property
    def confirm_runs(self) -> tuple[TrialData, ...]:
        """Every run of the confirm stage, by arm and seed."""
        return tuple(rerun for arm in self.arms for rerun in arm.confirm_runs)

    @property
    def harness_scores(self) -> dict[str, tuple[float | None, ...]]:
        """By `TASK/METRIC` of lm-evaluation-harness: the score of each arm."""
        by_arm = [arm.harness for arm in self.arms]
        names = dict.fromkeys(name for scores in by_arm for name in scores)
        return {name: tuple(scores.get(name) for scores in by_arm) for name in names}

    @property
    def run_records(self) -> tuple[RunRecord, ...]:
        """The record of every trial whose record can be read."""
        return tuple(trial.record for trial in self.trials if trial.record)

    @property
    def tokens_trained(self) -> int:
        """The number of tokens that the runs of all stages trained on."""
        former = (run for arm in self.arms for run in arm.former_runs)
        runs = (*self.trials, *self.confirm_runs, *former)
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
    def example_groups(self) -> str | None:
        """The name of the groups of test examples, such as `documents`; None if each example is a group."""
        if self.evidence.num_groups == self.evidence.num_examples:
            return None
        run = self.confirm_runs[0]
        if column := run.setting("data.group"):
            return f"groups of `{column}`"
        return "prompts" if run.setting("data.name") == "chat" else "documents"

    @cached_property
    def swept_keys(self) -> tuple[str, ...]:
        """The dotted keys that any arm sweeps, in the order of the arms."""
        keys = [key for arm in self.arms for key in arm.row.space]
        return tuple(dict.fromkeys([*keys, *(key for trial in self.trials for key in trial.params)]))

    def best_score(self, method: str) -> float | None:
        """Returns the best search score of a method: `frozen` is the base model, `full` is full fine-tuning."""
        best = [arm.best for arm in self.arms if arm.row.method == method and arm.best]
        return min(
            (trial.value for trial in best if trial.value is not None), key=lambda v: self.sign * v, default=None
        )

    def full_gain_share_of_arm(self, arm: ArmData) -> tuple[float | None, Interval | None]:
        """Returns an arm's share of full fine-tuning's gain with its interval: on test data after a confirm stage."""
        if self.evidence.arms:
            confirmed = self.evidence.arm(arm.name)
            return (confirmed.share_of_full_gain, confirmed.share_interval) if confirmed else (None, None)
        return self.share_of_full_gain(arm.best.value if arm.best else None), None

    def share_of_full_gain(self, score: float | None) -> float | None:
        """Returns (base - score) / (base - full), or None if a score is missing or full fine-tuning gained nothing."""
        base, full = self.best_score("frozen"), self.best_score("full")
        if score is None or base is None or full is None or self.sign * (base - full) <= 0:
            return None
        return (base - score) / (base - full)


def group_by_rank(arms: Iterable[ArmData]) -> list[list[ArmData]]:
    """Returns groups of two or more arms that differ in nothing but rank, each by rising rank."""
    groups: dict[str, list[ArmData]] = {}
    for arm in arms:
        if arm.rank is not None:
            others = {key: value for key, value in arm.row.settings.items() if key != RANK}
            groups.setdefault(f"{arm.row.method} {sorted(others.items(), key=str)}", []).append(arm)
    found = [sorted(group, key=lambda arm: arm.rank or 0.0) for group in groups.values()]
    return [group for group in found if len({arm.rank for arm in group}) > 1]


def finite_number(value: Any) -> float | None:
    """Returns the value if it is a finite number, else None."""
    return value if is_number(value) else None


def load_sweep_data(folder: Path) -> SweepData:
    """Reads a sweep's folder.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    record = read_sweep(folder)
    problems: list[str] = []
    arms = tuple(_join_arm(row, record, folder, problems) for row in record.arms)
    if record.confirm:
        problems += [sentence for arm in arms if (sentence := _describe_missing_scores(arm))]
    scores = _read_test_scores(arms, record, folder, problems)
    groups = group_by_rank(arm for arm in arms if arm.row.method not in ("frozen", "full"))
    return SweepData(
        folder=folder,
        record=record,
        arms=arms,
        problems=tuple(problems),
        evidence=compare_arms(
            scores,
            [(arm.name, arm.row.method) for arm in arms],
            sign=1 if record.direction == "minimize" else -1,
            margin=parse_margin(record.margin),
            rank_groups=[{arm.rank: arm.name for arm in group if arm.rank} for group in groups],
        ),
    )


def _join_arm(arm: ArmRow, record: SweepRecord, folder: Path, problems: list[str]) -> ArmData:
    rows = sorted((row for row in record.trials if row.arm == arm.name), key=lambda row: row.number)
    trials = tuple(_join_trial(row, record.metric, folder, problems) for row in rows)
    best = find_winner(trials, record=record)
    confirm_rows = sorted(list_confirm_rows(arm.name, best, record=record), key=lambda row: row.seed)
    former_rows = [row for row in record.confirm if row.arm == arm.name and row not in confirm_rows]
    return ArmData(
        row=arm,
        trials=trials,
        best=best,
        confirm_runs=tuple(_join_trial(row, record.metric, folder, problems) for row in confirm_rows),
        former_runs=tuple(_join_trial(row, record.metric, folder, problems) for row in former_rows),
        occupancy=measure_occupancy([*rows, *confirm_rows, *former_rows]),
    )


def _join_trial(row: TrialRow | ConfirmRow, metric: str, folder: Path, problems: list[str]) -> TrialData:
    seed, number, params = (row.seed, row.trial, {}) if isinstance(row, ConfirmRow) else (None, row.number, row.params)
    run = None
    try:
        run = read_run(folder / row.run)
    except (RecordError, OSError) as error:
        if row.state != "running":  # a run that begins has no record yet
            problems.append(f"The run `{row.run}` can't be read: {error}")
    return TrialData(
        arm=row.arm,
        number=number,
        seed=seed,
        state=row.state,
        params=params,
        value=finite_number(row.value),
        run=row.run,
        reason=row.reason or (run.reason if run else None),
        record=run,
        curve=_read_curve(folder / row.run, metric) if run and seed is None else (),
    )


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


def _read_test_scores(arms: Sequence[ArmData], record: SweepRecord, folder: Path, problems: list[str]) -> ConfirmScores:
    values: dict[RunKey, float] = {}
    examples: dict[RunKey, ExampleScores] = {}
    for rerun in (rerun for arm in arms for rerun in arm.confirm_runs if rerun.is_complete):
        if rerun.value is None or rerun.seed is None:
            continue
        values[rerun.arm, rerun.seed] = rerun.value
        path = folder / rerun.run / TEST_SCORES_FILE
        try:
            if path.is_file():
                examples[rerun.arm, rerun.seed] = read_examples(path)
        except (OSError, ValueError) as error:
            problems.append(f"`{rerun.run}/{TEST_SCORES_FILE}` is not used: {error}.")
    return build_scores(
        values,
        examples,
        deterministic=frozenset(arm.name for arm in arms if arm.row.method == "frozen"),
        is_perplexity=record.metric == "perplexity",
        score_range=find_metric_range(record),
    )


def find_metric_range(record: SweepRecord) -> tuple[float, float]:
    """Returns the lowest and the highest possible value of the sweep's metric."""
    if len(record.metric_range) != 2:
        return METRIC_RANGES.get(record.metric, UNBOUNDED)
    low, high = map(finite_number, record.metric_range)  # infinity was written as null
    return (-math.inf if low is None else low, math.inf if high is None else high)
