"""The next step for each open answer: one command that probably helps, or what a new sweep needs.

A step that was followed is not advised again.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasweep.config.command_line import format_override
from lorasweep.config.run import LR, MIN_STEPS, STEPS_KEY
from lorasweep.config.sweep import ENOUGH_SEEDS, ENOUGH_TRIALS
from lorasweep.disk import is_running
from lorasweep.record import ArmRow
from lorasweep.report.caveats import Learning, find_bounds
from lorasweep.report.evidence.verdicts import Answer, NextStep, StepName
from lorasweep.report.recommend import choose_arm
from lorasweep.report.sweep_data import SweepData

OTHER_ANSWERS = ("present", "retained")
"""Answers that the sweep does not state as questions."""
SEEDS_RATIOS = (2, 4)
"""Numbers of seeds that are tried, as multiples of those of the sweep."""
FULL_RATE_RATIO = 0.1
"""The learning rates of full fine-tuning are this share of LoRA's, as in a drafted sweep."""
MAX_STEPS_RATIO = 10
"""The longer run has at most this many times the steps."""
LATE_SHARE = 0.75
"""The share of a run's steps after which its improvement is late."""


def find_next_step(answer: Answer, data: SweepData, learning: Learning) -> NextStep | None:
    """Returns the step for an open answer, or for one that needs full fine-tuning; None if no step probably helps."""
    record = data.record
    if answer.missing == "no full arm" and record.status == "complete":
        return _add_full(data)
    if answer.state != "open":
        return None
    if record.status != "complete":
        return NextStep(name="wait" if is_running(data.folder) else "complete", command=data.completing_command)
    if learning.has_failed or _is_short(data) or _improves_late(data, learning):
        return _train_longer(data, learning)
    if not record.looks:
        return _resume("confirm", {"confirm.seeds": [3, 6, 10]}, data)
    if answer.name == "setting":
        chosen = choose_arm(data, ["lora"])
        return _add_trials([chosen.subject.row], data) if chosen else None
    if (blocking := answer.blocking) is None or blocking.blocker == "no scores":
        return None
    if blocking.blocker == "no margin":
        return NextStep(name="none", needs=("no margin",))
    if blocking.blocker == "one seed":
        seeds = max(ENOUGH_SEEDS, *record.looks)  # an unplanned look may not be below the planned ones
        return _add_seeds(seeds, data)
    numbers, is_asked = [ratio * max(record.looks) for ratio in SEEDS_RATIOS], answer.name not in OTHER_ANSWERS
    enough = numbers if not is_asked and blocking.blocker == "few seeds" else []
    if is_asked:
        enough = [seeds for seeds in numbers if data.evidence.may_settle(answer, seeds=seeds)]
    if enough and not _had_more_seeds(data):
        return _add_seeds(enough[0], data)
    if not is_asked:
        return None
    if blocking.blocker == "few trials":
        rows = [row for row in record.arms if row.space and (row.name == answer.arm or row.method == "full")]
        return _add_trials(rows, data)
    if blocking.blocker is None:
        return None
    if enough or blocking.blocker != "few seeds":
        return NextStep(name="none", number=None if enough else numbers[-1], needs=(blocking.blocker,))
    # what is left with so many seeds is the error of the test examples
    return NextStep(name="none", number=numbers[-1], needs=("few examples", "few seeds"))


def _train_longer(data: SweepData, learning: Learning) -> NextStep | None:
    """Returns the same sweep with longer runs: one epoch, or twice the steps.

    None if steps were typed, and the runs have an epoch and neither are short nor improve at their end.
    """
    run, record, ratio = data.longest_run, data.record, 2.0
    overrides = record.definition.get("overrides", {})
    if run is None or not run.steps_planned:
        return None
    if run.epochs and run.epochs < 1:
        ratio = max(ratio, 1 / run.epochs)
    elif STEPS_KEY in overrides and not _is_short(data) and not _improves_late(data, learning):
        return None
    steps = max(MIN_STEPS, math.ceil(run.steps_planned * min(ratio, MAX_STEPS_RATIO)))
    kept = {key: value for key, value in overrides.items() if not key.endswith(STEPS_KEY)}
    command = _name_new_sweep(data, {**kept, STEPS_KEY: steps}, ending="longer")
    seconds = record.makespan_s * steps / run.steps_planned or None
    return NextStep(name="longer", command=command, number=steps, seconds=seconds)


def _name_new_sweep(data: SweepData, overrides: Mapping[str, Any], *, ending: str) -> str | None:
    """Returns the command of another sweep of the same file, in a folder of its own; None if there is no file."""
    if not data.record.source:
        return None
    # `worker` says how and not what, and its number is often chosen by the sweep
    overrides = {key: value for key, value in overrides.items() if not key.startswith("worker.")}
    words = [shlex.quote(str(Path(data.record.source))), *(format_override(*one) for one in overrides.items())]
    return " ".join(["lorasweep sweep", *words, format_override("sweep.output", f"{data.folder}-{ending}")])


def _add_full(data: SweepData) -> NextStep | None:
    """Returns a new sweep with an arm of full fine-tuning: that of the file, or one at a tenth of LoRA's rates.

    It has as many trials as verdicts on it need, also where `--minutes` cut those of LoRA.
    """
    definition, arms = data.record.definition, data.record.arms
    overrides, file = definition.get("overrides", {}), definition.get("file", {})
    given = file.get("arms") or {}
    cut = [f"arms.{name}" for name, arm in given.items() if (arm.get("settings") or {}).get("method") == "full"]
    kept = {key: value for key, value in overrides.items() if key not in cut}
    shared = {**(file.get("settings") or {}), **overrides}.get("sweep.trials")
    if isinstance(shared, int) and shared < 2 * ENOUGH_TRIALS:  # an arm that searches one key gets half of them
        trials = [given[key.partition(".")[2]].get("trials") or 0 for key in cut]
        kept |= {f"{key}.trials": max(ENOUGH_TRIALS, number) for key, number in zip(cut, trials, strict=True)}
    bounds = next((found for row in arms if row.method == "lora" and (found := find_bounds(row.space.get(LR)))), None)
    if not cut and bounds is None:
        return None
    if not cut and bounds:
        low, high = (float(f"{FULL_RATE_RATIO * bound:.2g}") for bound in bounds[:2])
        rates = {"low": low, "high": high, "log": True}
        kept["arms.full"] = {"settings": {"method": "full"}, "space": {LR: rates}, "trials": ENOUGH_TRIALS}
    command = _name_new_sweep(data, kept, ending="full")
    return NextStep(name="arm", command=command) if command else None


def _is_short(data: SweepData) -> bool:
    return data.longest_run is not None and 0 < data.longest_run.steps_planned < MIN_STEPS


def _improves_late(data: SweepData, learning: Learning) -> bool:
    """Returns whether the best LoRA run improved at its end as fast as on average, so that it stopped too early."""
    chosen = choose_arm(data, ["lora"]) or choose_arm(data)
    curve = chosen.setting.run.curve if chosen and chosen.setting.run else ()
    if len(curve) < 2 or learning.score is None:
        return False
    sign, (last_step, last) = data.record.search_metric.sign, curve[-1]
    early = [(step, score) for step, score in curve[:-1] if step <= LATE_SHARE * last_step]
    if not early:
        return False
    step, score = early[-1]
    total, late = sign * (learning.score - last), sign * (score - last)
    return late > 0 and late / (last_step - step) >= total / last_step


def _add_trials(rows: Sequence[ArmRow], data: SweepData) -> NextStep | None:
    """Returns twice the trials; None if the sweep was resumed with more trials before."""
    if any(change.trials for change in data.record.changes) or not rows:
        return None
    changes = {f"arms.{row.name}.trials": 2 * row.trials for row in rows}
    return _resume("trials", changes, data, number=2 * rows[0].trials)


def _had_more_seeds(data: SweepData) -> bool:
    """Returns whether the sweep was resumed with more seeds, beyond those that give an error at all."""
    typed = [change.settings.get("confirm.seeds", 0) for change in data.record.changes]
    looks = [look for seeds in typed for look in (seeds if isinstance(seeds, list | tuple) else [seeds])]
    return any(isinstance(look, int) and look > ENOUGH_SEEDS for look in looks)


def _add_seeds(num_seeds: int, data: SweepData) -> NextStep:
    """Returns confirm runs of all subjects up to a number of seeds, with their time at the pace of the sweep."""
    added, total = 0.0, sum(trial.record.wall_s for trial in data.trials if trial.record)
    for one in data.subjects:
        seconds = [run.record.wall_s for run in one.confirm_runs if run.record]
        total += sum(seconds)
        if seconds and not one.row.has_fixed_score:
            added += max(num_seeds - len(seconds), 0) * statistics.fmean(seconds)
    step = _resume("seeds", {"confirm.seeds": num_seeds}, data, number=num_seeds)
    return replace(step, seconds=data.record.makespan_s * added / total if added else None)


def _resume(name: StepName, changes: Mapping[str, Any], data: SweepData, *, number: int | None = None) -> NextStep:
    words = [shlex.quote(str(data.folder)), *(format_override(key, value) for key, value in changes.items())]
    return NextStep(name=name, command=f"lorasweep sweep --resume {' '.join(words)}", number=number)
