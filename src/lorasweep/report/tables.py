"""Joins the records of one sweep: each trial with its run's record and validation curve, each arm with its trials.

Comes after `record`, before `summary` and the figures. A run folder that is missing or damaged is a sentence, no error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
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
    read_run,
    read_steps,
    read_sweep,
)

Curve = tuple[tuple[int, float], ...]
"""Validation values of the sweep's metric over training: pairs of step and value, by step."""

KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "dict": dict,
    "list": list,
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a sweep with what its run left on disk."""

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
        return _finite(self.setting(key))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm with its trials in the order of their numbers."""

    row: ArmRow
    trials: tuple[Trial, ...]
    best: Trial | None
    """The best of the complete trials, the earlier one of equals; None where no trial is complete."""

    @property
    def name(self) -> str:
        """The arm's name."""
        return self.row.name

    def count(self, state: TrialState) -> int:
        """Returns how many trials ended in that state."""
        return sum(trial.state == state for trial in self.trials)


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """One sweep as the report reads it."""

    folder: Path
    record: SweepRecord
    arms: tuple[Arm, ...]
    problems: tuple[str, ...]
    """A sentence for each run that can't be read and each trial that belongs to no arm."""

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial, by arm and number."""
        return tuple(trial for arm in self.arms for trial in arm.trials)

    @property
    def run_records(self) -> tuple[RunRecord, ...]:
        """The record of every run that can be read."""
        return tuple(trial.record for trial in self.trials if trial.record)

    @property
    def sign(self) -> int:
        """1 where lower scores are better, else -1: `sign * score` is always to be minimized."""
        return 1 if self.record.direction == "minimize" else -1

    @property
    def swept_keys(self) -> tuple[str, ...]:
        """Dotted keys that any arm sweeps, in the order of the arms."""
        keys = [key for arm in self.arms for key in arm.row.space]
        return tuple(dict.fromkeys([*keys, *(key for trial in self.trials for key in trial.params)]))

    def best_arm(self, method: str) -> Arm | None:
        """Returns the arm of that method with the best score, or None where none has one."""
        scored = [arm for arm in self.arms if arm.row.method == method and arm.best]
        best = best_trial([arm.best for arm in scored if arm.best], sign=self.sign)
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


def best_trial(trials: Iterable[Trial], *, sign: int) -> Trial | None:
    """Returns the complete trial whose `sign * value` is lowest, the first of equals; None where none is complete."""
    complete = [(sign * trial.value, trial) for trial in trials if trial.is_complete and trial.value is not None]
    return min(complete, key=lambda pair: pair[0])[1] if complete else None


def load_sweep_data(folder: Path) -> SweepData:
    """Reads a sweep's folder: its record, and per trial the run's record and validation curve.

    Raises:
        RecordError: The folder is not a sweep or its record is damaged.
    """
    record = read_sweep(folder)
    rows: list[SweepRecord | ArmRow | TrialRow] = [record, *record.arms, *record.trials]
    for row in rows:
        _require_kinds(row, folder / SWEEP_FILE)
    sign = 1 if record.direction == "minimize" else -1
    arms = tuple(_join_arm(row, record, folder, sign=sign) for row in record.arms)
    names = {row.name for row in record.arms}
    strays = [trial for trial in record.trials if trial.arm not in names]
    problems = [trial.problem for arm in arms for trial in arm.trials if trial.problem]
    return SweepData(folder=folder, record=record, arms=arms, problems=(*map(_stray, strays), *problems))


def _stray(row: TrialRow) -> str:
    return f"Trial {row.number} belongs to arm `{row.arm}`, which is not listed."


def misfits(row: Any) -> list[str]:
    """Returns the names of a record's fields whose values are not of the kind that the field declares."""
    known = [f for f in fields(row) if not ("None" in str(f.type) and getattr(row, f.name) is None)]
    declared = [(f.name, KINDS.get(str(f.type).split("[", 1)[0])) for f in known]
    return [name for name, kind in declared if kind and not isinstance(getattr(row, name), kind)]


def _require_kinds(row: SweepRecord | ArmRow | TrialRow, path: Path) -> None:
    wrong = misfits(row)
    if wrong:
        raise RecordError(
            f"`{wrong[0]}` of a {type(row).__name__} must be of its declared type, "
            f"but got {getattr(row, wrong[0])!r} in {str(path)!r}. Restore the file."
        )


def _join_arm(row: ArmRow, record: SweepRecord, folder: Path, *, sign: int) -> Arm:
    mine = sorted((trial for trial in record.trials if trial.arm == row.name), key=lambda trial: trial.number)
    trials = tuple(_join_trial(trial, row, record.metric, folder) for trial in mine)
    return Arm(row=row, trials=trials, best=best_trial(trials, sign=sign))


def _join_trial(row: TrialRow, arm: ArmRow, metric: str, folder: Path) -> Trial:
    run, problem = _read_usable_run(folder, row.run)
    value = _finite(row.value)
    return Trial(
        arm=row.arm,
        method=arm.method,
        number=row.number,
        state=row.state,
        params=row.params,
        value=value if value is not None or run is None else _finite(run.score),
        run=row.run,
        reason=row.reason or (run.reason if run else None),
        record=run,
        curve=_read_curve(folder / row.run, metric) if run else (),
        problem=problem,
    )


def _read_usable_run(sweep: Path, run: str) -> tuple[RunRecord | None, str | None]:
    if not (sweep / run).resolve().is_relative_to(sweep.resolve()):
        return None, f"The run `{run}` is not read: its folder lies outside the sweep's."
    try:
        record = read_run(sweep / run)
    except (RecordError, OSError) as error:
        return None, f"The run `{run}` can't be read: {error}"
    if wrong := misfits(record):
        return None, f"The run `{run}` can't be read: `{wrong[0]}` is not of its declared type."
    return record, None


def _read_curve(run: Path, metric: str) -> Curve:
    values: dict[int, float] = {}
    try:
        for row in read_steps(run):
            validation = row.get("validation") if isinstance(row, dict) else None
            value = _finite(validation.get(metric)) if isinstance(validation, dict) else None
            if value is not None and isinstance(row.get("step"), int):
                # a resumed run writes the steps after its checkpoint again: the later row counts
                values[row["step"]] = value
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(sorted(values.items()))


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None
