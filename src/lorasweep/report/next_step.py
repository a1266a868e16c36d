"""The next command for each open question, or the reason why no command settles it."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorasweep.config.command_line import format_override
from lorasweep.config.data import DEFAULT_SPLIT_PERCENT
from lorasweep.record import QuestionName, is_number
from lorasweep.report.caveats import Learning, list_edges
from lorasweep.report.evidence.advice import (
    MIN_CHANCE,
    TRIAL_FACTOR,
    CurrentEvidence,
    Extension,
    find_regret_chance,
    find_step,
)
from lorasweep.report.evidence.evidence import build_scale
from lorasweep.report.evidence.verdicts import Answer
from lorasweep.report.sweep_data import SubjectData, SweepData
from lorasweep.wording import format_seconds

MAX_TEST_PERCENT = 50
"""Largest share of the training data that `data.test_fraction` may split off, in percent."""
MAX_COST_RATIO = 2.0
"""A step is affordable if it takes at most this many times as long as the sweep."""
MIN_USEFUL_SEEDS = 3
"""Number of seeds that is advised where one seed was used. Fewer give a warning."""


@dataclass(frozen=True)
class NextStep:
    """The command that would settle a question, or why there is none."""

    command: str | None
    reason: str
    """What the command does, or why no command settles the question."""
    chance: float | None = None
    """The chance that it settles the question; None if it is not known."""
    seconds: float | None = None
    """The time that it takes, at the pace of the sweep; None if it is not known."""

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
    return None if data.record.looks else _resume({"confirm.seeds": "auto"}, data, "adds the confirm stage")


def find_settling_step(name: QuestionName, blocking: Sequence[Answer], data: SweepData) -> NextStep:
    """Returns the step for a line that is open because of these answers, one of each LoRA arm."""
    record, scores = data.record, data.evidence.scores
    blockers = {answer.blocker for answer in blocking}
    if scores is None or "no scores" in blockers:
        return find_reasons("subjects have no test scores on the same seeds", data)
    if "no margin" in blockers and not any(row.is_base for row in record.arms):
        return _begin_again({"arms.frozen": {"settings": {"method": "frozen"}}}, data, "adds the frozen base")
    if "no margin" in blockers:
        return NextStep(None, "a new sweep needs `confirm.margin` as a number in the metric's unit")
    if "one seed" in blockers:
        seeds = max(MIN_USEFUL_SEEDS, *record.looks)  # an unplanned look may not be below the planned ones
        return _resume({"confirm.seeds": seeds}, data, f"{seeds} seeds in all, because one seed tells no chance")
    arms = {answer.arm for answer in blocking}
    searched = arms | (
        {row.name for row in record.arms if row.method == "full"} if name == "as_good_as_full" else set()
    )
    present = CurrentEvidence(
        questions=record.questions,
        answers=data.evidence.answers,
        scores=scores,
        scale=build_scale(record, scores),
        looks=record.looks,
        looks_done=[look.seeds for look in record.looks_done] or record.looks,
    )

    def estimate_seconds(extension: Extension) -> float:
        return _estimate_seconds(extension, present, searched, data)

    step = find_step(
        [question for question in record.questions if question.name == name and question.arm in arms],
        present,
        has_space=any(row.space for row in record.arms if row.name in searched),
        max_examples=_find_max_examples(data),
        cost=estimate_seconds,
        max_cost=MAX_COST_RATIO * record.makespan_s or math.inf,
    )
    if step is None:
        return NextStep(
            None,
            f"in {MAX_COST_RATIO:g} times the time of this sweep, no more seeds, trials or test examples have a chance "
            f"of {MIN_CHANCE:.0%}. The difference is close to the margin, or few test examples are known",
        )
    extension = step.extension
    more_seeds = {"confirm.seeds": extension.seeds}
    if extension.examples != 1:
        wanted = _enlarge_test(extension.examples, data)
        found = _begin_again(wanted, data, f"{extension.examples:g} times as many test examples")
    elif extension.trials > 1:
        rows = [row for row in record.arms if row.name in searched]
        changes = {f"arms.{row.name}.trials": extension.trials * row.trials for row in rows}
        is_more = extension.seeds > max(record.looks)
        reason = f"twice the trials{f', {extension.seeds} seeds in all' if is_more else ''}"
        found = _resume(changes | (more_seeds if is_more else {}), data, reason)
    else:
        found = _resume(more_seeds, data, f"{extension.seeds} seeds in all")
    return replace(found, chance=step.chance, seconds=estimate_seconds(extension) or None)


def find_regret_step(one: SubjectData, data: SweepData) -> NextStep:
    """Returns the step to a setting that no untried one is expected to beat by more than the margin."""
    trials = {f"arms.{one.arm}.trials": TRIAL_FACTOR * one.row.trials}
    regret, margin = one.setting.regret if one.setting else None, data.search_margin
    if regret is None or not margin:
        return _resume(trials, data, "twice the trials, with an unknown chance")
    if (chance := find_regret_chance(regret / margin)) < MIN_CHANCE:
        reason = f"twice the trials have a chance below {MIN_CHANCE:.0%}"
        edges = "; ".join(clause for _, clause in list_edges(data))
        return NextStep(None, f"{reason}; {edges or 'a new sweep may search fewer keys'}")
    return replace(_resume(trials, data, "twice the trials"), chance=chance)


def add_seeds(data: SweepData) -> NextStep:
    return _resume({"confirm.seeds": 2 * max(data.record.looks)}, data, "twice the seeds, with an unknown chance")


def find_reasons(missing: str, data: SweepData) -> NextStep:
    """Returns where the reasons are why something is missing."""
    return NextStep(None, f"{missing}; {str(data.folder / 'runs')!r} has the reasons")


def _estimate_seconds(extension: Extension, present: CurrentEvidence, arms: Collection[str], data: SweepData) -> float:
    """Returns the time of an extension at the pace of the sweep; 0 if no run has a time."""
    record = data.record
    if extension.examples != 1:
        return record.makespan_s
    searched: defaultdict[str, float] = defaultdict(float)
    for trial in data.trials:
        searched[trial.arm] += trial.record.wall_s if trial.record else 0.0
    added = (extension.trials - 1) * sum(searched[name] for name in arms)
    confirmed = 0.0
    for one in data.subjects:
        seconds = [run.record.wall_s for run in one.confirm_runs if run.record]
        confirmed += sum(seconds)
        if seconds and (extension.is_repeated or one.name in present.list_trained()):
            kept = 0 if extension.is_repeated else len(seconds)
            added += max(extension.seeds - kept, 0) * statistics.fmean(seconds)
    total = sum(searched.values()) + confirmed
    return record.makespan_s * added / total if total else 0.0


def _read_test_size(data: SweepData) -> tuple[int | None, float | None]:
    """Returns the largest number of test examples, and else the percentage of the training data that they are.

    Neither is known if they are a file, all of which is used.
    """
    found: Any = data.run_records[0].config.get("data") if data.run_records else None
    config: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    if is_number(limit := config.get("max_test_examples")):
        return int(limit), None
    if "test_fraction" not in config or config.get("test") is not None:
        return None, None
    fraction = config["test_fraction"]
    return None, 100 * fraction if is_number(fraction) else DEFAULT_SPLIT_PERCENT


def _find_max_examples(data: SweepData) -> float:
    """Returns the largest factor on the number of test examples that a new sweep may have."""
    limit, percent = _read_test_size(data)
    return math.inf if limit else MAX_TEST_PERCENT / percent if percent else 1.0


def _enlarge_test(factor: float, data: SweepData) -> dict[str, Any]:
    """Returns the override for this factor of test examples, which `_find_max_examples` allows."""
    limit, percent = _read_test_size(data)
    if limit:
        return {"data.max_test_examples": math.ceil(factor * limit)}
    return {"data.test_fraction": math.ceil(factor * (percent or 0.0)) / 100}


def _resume(changes: Mapping[str, Any], data: SweepData, reason: str) -> NextStep:
    words = [shlex.quote(str(data.folder)), *(format_override(key, value) for key, value in changes.items())]
    return NextStep(f"lorasweep sweep --resume {' '.join(words)}", reason)


def _begin_again(changes: Mapping[str, Any], data: SweepData, reason: str) -> NextStep:
    """Returns a new sweep of the same file with further overrides, because these change trials that have begun."""
    typed = " ".join(format_override(key, value) for key, value in changes.items())
    record = data.record
    if record.source is None:
        return NextStep(None, f"a new sweep would, with `{typed}` added to the command that began this one")
    overrides = record.definition.get("overrides")
    old = overrides.items() if isinstance(overrides, Mapping) else ()
    kept = [format_override(key, value) for key, value in old if key not in (*changes, "sweep.output")]
    command = " ".join(["lorasweep sweep", shlex.quote(record.source), *kept, typed])
    return NextStep(command, f"a new sweep: {reason}")
