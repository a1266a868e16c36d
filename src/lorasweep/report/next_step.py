"""The next step for each open question: a command, or what may settle it in a new sweep."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasweep.config.command_line import format_override
from lorasweep.record import ArmRow, QuestionName
from lorasweep.report.caveats import Learning
from lorasweep.report.evidence.advice import MIN_CHANCE, CurrentEvidence, find_step
from lorasweep.report.evidence.evidence import build_scale
from lorasweep.report.evidence.verdicts import Answer, Blocker
from lorasweep.report.sweep_data import SweepData
from lorasweep.wording import format_seconds, join_words

MAX_COST_RATIO = 2.0
"""A step is affordable if it takes at most this many times as long as the sweep."""
MIN_USEFUL_SEEDS = 3
"""Number of seeds that is advised where one seed was used. Fewer give a warning."""
REMEDIES: Mapping[Blocker, str] = {
    "no margin": "an arm with `method=frozen`, or `confirm.margin` as a number in the metric's unit",
    "no gain": "more steps or data",
    "few seeds": "a larger `confirm.margin`",
    "few examples": "more test examples",
}
"""For each blocker of an answer, a change that may settle the question in a new sweep."""


@dataclass(frozen=True)
class NextStep:
    """The command that may settle a question, or why there is none."""

    command: str | None
    reason: str
    """What the command does, or why no command settles the question."""
    chance: float | None = None
    """The chance that further seeds settle the question; None for other steps."""
    seconds: float | None = None
    """The time that further seeds take, at the pace of the sweep; None if it is not known."""

    @property
    def details(self) -> str:
        """The reason, the chance and the time in one clause."""
        chance = "" if self.chance is None else f"chance to settle it {self.chance:.0%}"
        time = f"about {format_seconds(self.seconds)}" if self.seconds else ""
        return ", ".join(part for part in (self.reason, chance, time) if part)

    def __str__(self) -> str:
        return f"Next ({self.details}): {self.command}" if self.command else f"No command settles this: {self.reason}."


def find_early_step(data: SweepData, learning: Learning | None = None) -> NextStep | None:
    """Returns the step before any verdict: to a complete sweep, and to test scores. None if the sweep has both."""
    if learning and learning.state == "nothing":
        return NextStep(None, "nothing was learned with these data, steps and ranges")
    if data.record.status != "complete":
        return NextStep(data.completing_command, "completes the sweep")
    return None if data.record.looks else _resume({"confirm.seeds": [3, 6, 10]}, data, "adds the confirm stage")


def find_settling_step(name: QuestionName, blocking: Sequence[Answer], data: SweepData) -> NextStep:
    """Returns the step for a line that is open because of these answers, one of each LoRA arm."""
    record, scores = data.record, data.evidence.scores
    blockers = {answer.blocker for answer in blocking}
    if scores is None or "no scores" in blockers:
        return find_reasons("subjects have no test scores on the same seeds", data)
    if "no margin" in blockers:
        return NextStep(None, f"a new sweep needs {REMEDIES['no margin']}")
    if "one seed" in blockers:
        seeds = max(MIN_USEFUL_SEEDS, *record.looks)  # an unplanned look may not be below the planned ones
        return _resume({"confirm.seeds": seeds}, data, f"{seeds} seeds in all, because one seed tells no chance")
    arms = {answer.arm for answer in blocking}
    present = CurrentEvidence(
        questions=record.questions,
        answers=data.evidence.answers,
        scores=scores,
        scale=build_scale(record, scores),
        looks=record.looks,
        looks_done=[look.seeds for look in record.looks_done] or record.looks,
    )

    def estimate_seconds(num_seeds: int) -> float:
        return _estimate_seconds(num_seeds, present.list_trained(), data)

    line = [question for question in record.questions if question.name == name and question.arm in arms]
    max_seconds = MAX_COST_RATIO * record.makespan_s or math.inf
    step = find_step(line, present, cost=estimate_seconds, max_cost=max_seconds)
    if step:
        found = _resume({"confirm.seeds": step.seeds}, data, f"{step.seeds} seeds in all")
        return replace(found, chance=step.chance, seconds=estimate_seconds(step.seeds) or None)
    if "few trials" in blockers:
        return add_trials(
            [row for row in record.arms if row.space and (row.name in arms or row.method == "full")], data
        )
    remedies = [text for blocker, text in REMEDIES.items() if blocker in blockers]
    return NextStep(
        None,
        f"no affordable number of seeds has a chance of {MIN_CHANCE:.0%}; a new sweep may settle it with "
        f"{join_words(remedies, last='or')}",
    )


def add_trials(rows: Sequence[ArmRow], data: SweepData) -> NextStep:
    return _resume({f"arms.{row.name}.trials": 2 * row.trials for row in rows}, data, "twice the trials")


def add_seeds(data: SweepData) -> NextStep:
    return _resume({"confirm.seeds": 2 * max(data.record.looks)}, data, "twice the seeds")


def find_reasons(missing: str, data: SweepData) -> NextStep:
    """Returns where the reasons are why something is missing."""
    return NextStep(None, f"{missing}; {str(data.folder / 'runs')!r} has the reasons")


def _estimate_seconds(num_seeds: int, trained: Collection[str], data: SweepData) -> float:
    """Returns the time of confirm runs up to a number of seeds, at the pace of the sweep; 0 if no run has a time."""
    added, total = 0.0, sum(trial.record.wall_s for trial in data.trials if trial.record)
    for one in data.subjects:
        seconds = [run.record.wall_s for run in one.confirm_runs if run.record]
        total += sum(seconds)
        if seconds and one.name in trained:
            added += max(num_seeds - len(seconds), 0) * statistics.fmean(seconds)
    return data.record.makespan_s * added / total if total else 0.0


def _resume(changes: Mapping[str, Any], data: SweepData, reason: str) -> NextStep:
    words = [shlex.quote(str(data.folder)), *(format_override(key, value) for key, value in changes.items())]
    return NextStep(f"lorasweep sweep --resume {' '.join(words)}", reason)
