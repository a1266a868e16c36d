"""The next command for each open question, or the reason why no command settles it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.config.command_line import format_override
from lorasweep.config.data import DEFAULT_SPLIT_PERCENT
from lorasweep.record import is_number
from lorasweep.report.caveats import Learning
from lorasweep.report.evidence.verdicts import Answer, Remedy
from lorasweep.report.sweep_data import SweepData

MAX_TEST_PERCENT = 50
"""Largest share of the training data that `data.test_fraction` may split off, in percent."""


@dataclass(frozen=True)
class NextStep:
    """The command that would settle a question, or why there is none."""

    command: str | None
    reason: str
    """What the command does, or why no command settles the question."""

    def __str__(self) -> str:
        return f"Next ({self.reason}): {self.command}" if self.command else f"No command settles this: {self.reason}."


def find_early_step(data: SweepData, learning: Learning | None = None) -> NextStep | None:
    """Returns the step before any verdict: to a complete sweep, and to test scores. None if the sweep has both."""
    if learning and learning.state == "nothing":
        return NextStep(None, "nothing was learned with these data, steps and ranges")
    if data.record.status != "complete":
        return NextStep(data.completing_command, "the sweep is not complete")
    return None if data.record.looks else _resume({"confirm.seeds": "auto"}, data, "adds the confirm stage")


def find_remedy_step(blocking: Sequence[Answer], data: SweepData) -> NextStep | None:
    """Returns the step that would settle these answers, one of each LoRA arm; None if nothing practical would."""
    arms = [answer.arm for answer in blocking if answer.remedy]
    if any(answer.name == "as_good_as_full" for answer in blocking):
        arms += [row.name for row in data.record.arms if row.method == "full"]
    return _apply_remedy([answer.remedy for answer in blocking if answer.remedy], arms, data)


def add_trials(arms: Sequence[str], data: SweepData) -> NextStep:
    trials = {f"arms.{row.name}.trials": 2 * row.trials for row in data.record.arms if row.name in arms}
    return _resume(trials, data, "twice the trials")


def add_seeds(data: SweepData) -> NextStep:
    seeds = 2 * max(data.record.looks)
    return _resume({"confirm.seeds": seeds}, data, "twice the seeds, which may not be enough")


def find_reasons(missing: str, data: SweepData) -> NextStep:
    """Returns where the reasons are why something is missing."""
    return NextStep(None, f"{missing}; {str(data.folder / 'runs')!r} has the reasons")


def _apply_remedy(remedies: Sequence[Remedy], arms: Sequence[str], data: SweepData) -> NextStep | None:
    """Returns the cheapest step of the remedies of several arms: more seeds, trials or test examples, or a margin."""
    amounts = {kind: max(one.amount for one in remedies if one.kind == kind) for kind in {one.kind for one in remedies}}
    if "seeds" in amounts:
        # an unplanned look, so it may not be below the planned ones
        seeds = max(int(amounts["seeds"]), *data.record.looks)
        return _resume({"confirm.seeds": seeds}, data, f"{seeds} seeds in all")
    if "trials" in amounts:
        return add_trials(arms, data)
    if "examples" in amounts:
        return _add_test_examples(amounts["examples"], data)
    if "margin" in amounts and not any(row.is_base for row in data.record.arms):
        return _begin_again({"arms.frozen": {"settings": {"method": "frozen"}}}, data, "adds the frozen base")
    return NextStep(None, "a new sweep needs `confirm.margin` as a number in the metric's unit") if amounts else None


def _add_test_examples(factor: float, data: SweepData) -> NextStep:
    """Returns the new sweep with this factor of test examples, if they are split off the training data."""
    found: Any = data.run_records[0].config.get("data") if data.run_records else None
    config: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    numbers = {key: value for key, value in config.items() if is_number(value)}
    if "max_test_examples" in numbers:
        needed = math.ceil(factor * numbers["max_test_examples"])
        return _begin_again({"data.max_test_examples": needed}, data, f"has {factor:g} times as many test examples")
    percent = math.ceil(factor * 100 * numbers.get("test_fraction", DEFAULT_SPLIT_PERCENT / 100))
    if "test_fraction" not in config or config.get("test") is not None or percent > MAX_TEST_PERCENT:
        return NextStep(None, f"it needs a new sweep with {factor:g} times as much test data")
    return _begin_again({"data.test_fraction": percent / 100}, data, f"has {factor:g} times as many test examples")


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
    return NextStep(command, f"a new sweep that {reason}")
