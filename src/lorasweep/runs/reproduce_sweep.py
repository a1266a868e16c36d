"""Comparison of a sweep with its repetition: `lorasweep reproduce SWEEP` finds the first difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.record import ConfirmRow, SweepRecord, TrialRow, folder_of_run, read_sweep
from lorasweep.runs.compare_runs import read_values

MISSING = "nothing"
Row = TrialRow | ConfirmRow


@dataclass(frozen=True, kw_only=True)
class SweepReproduction:
    """The result of running a sweep again."""

    folder: Path
    """The new sweep's folder."""
    num_trials: int
    difference: str | None
    """The first difference in a clause: trial or run, step, key and both values."""

    @property
    def holds(self) -> bool:
        """Whether the two sweeps are identical."""
        return self.difference is None

    def describe(self) -> str:
        """Returns the result in a sentence."""
        if self.difference is None:
            return f"identical: all {self.num_trials} trials, their decisions, losses and scores: {self.folder}"
        return f"different: {self.difference}: {self.folder}"


def compare_sweeps(first: Path, second: Path) -> SweepReproduction:
    """Compares proposals, decisions, losses of every step and scores of two sweeps, trial by trial.

    Args:
        first: Folder of the sweep that was reproduced.
        second: Folder of the new one.

    Raises:
        RecordError: One of them has no record, or it is damaged.
    """
    one, other = read_sweep(first), read_sweep(second)
    difference = next(_differences(one, other, first, second), None)
    return SweepReproduction(folder=second, num_trials=len(one.trials) + len(one.confirm), difference=difference)


def _differences(one: SweepRecord, other: SweepRecord, first: Path, second: Path) -> Iterator[str]:
    keys = ("metric", "direction", "confirm_seeds")
    yield from _differ("sweep", {k: getattr(one, k) for k in keys}, {k: getattr(other, k) for k in keys})
    pairs: tuple[tuple[Sequence[Row], Sequence[Row]], ...] = ((one.trials, other.trials), (one.confirm, other.confirm))
    for rows, others in pairs:
        yield from _differ("sweep", {"number of trials": len(rows)}, {"number of trials": len(others)})
        for row, again in zip(rows, others, strict=False):
            yield from _differ_in_row(row, again, folder_of_run(first, row.run), folder_of_run(second, again.run))


def _differ_in_row(
    row: TrialRow | ConfirmRow, other: TrialRow | ConfirmRow, first: Path, second: Path
) -> Iterator[str]:
    if isinstance(row, TrialRow):
        where = f"trial {row.arm}-{row.number}"
        yield from _differ(where, row.params, getattr(other, "params", {}))
    else:
        where = f"confirm run {row.arm} seed {row.seed}"
    values, others = read_values(first), read_values(second)
    for step, key in sorted({*values, *others}):
        before, now = ({key: found[step, key]} if (step, key) in found else {} for found in (values, others))
        yield from _differ(f"{where}, step {step}", before, now)
    yield from _differ(where, {"state": row.state, "value": row.value}, {"state": other.state, "value": other.value})


def _differ(where: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*first, *second]):
        before, now = first.get(key, MISSING), second.get(key, MISSING)
        if before != now:
            yield f"{where}: `{key}` was {before!r} and is {now!r}"
