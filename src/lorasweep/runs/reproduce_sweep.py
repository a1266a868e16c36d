"""Running a whole sweep again from its record, and finding the first thing that differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorasweep.record import ConfirmRow, SweepRecord, TrialRow, folder_of_run, read_sweep
from lorasweep.runs.compare_runs import read_values

MISSING = "nothing"
Row = TypeVar("Row", TrialRow, ConfirmRow)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where two sweeps differ."""

    where: str
    """Trial or run, and the step where there is one."""
    key: str
    first: Any
    second: Any

    def describe(self) -> str:
        """Returns it in a sentence."""
        return f"{self.where}: `{self.key}` was {self.first!r} and is {self.second!r}"


@dataclass(frozen=True, kw_only=True)
class SweepReproduction:
    """What came out when a sweep was run again."""

    folder: Path
    """The new sweep's folder."""
    num_trials: int
    difference: Difference | None

    @property
    def holds(self) -> bool:
        """Whether the two sweeps are identical."""
        return self.difference is None

    def describe(self) -> str:
        """Returns the outcome in a sentence."""
        if self.difference is None:
            return f"identical: all {self.num_trials} trials, their decisions, losses and scores: {self.folder}"
        return f"different: {self.difference.describe()}: {self.folder}"


def compare_sweeps(first: Path, second: Path) -> SweepReproduction:
    """Compares proposals, decisions, losses of every step and scores of two sweeps, trial by trial in their order.

    Args:
        first: Folder of the sweep that was reproduced.
        second: Folder of the new one.

    Raises:
        RecordError: One of them has no record, or it is damaged.
    """
    one, other = read_sweep(first), read_sweep(second)
    differences = _find_differences(one, other, first, second)
    return SweepReproduction(
        folder=second, num_trials=len(one.trials) + len(one.confirm), difference=next(differences, None)
    )


def _find_differences(one: SweepRecord, other: SweepRecord, first: Path, second: Path) -> Iterator[Difference]:
    for key in ("metric", "direction", "confirm_seeds"):
        yield from _differ("sweep", key, getattr(one, key), getattr(other, key))
    yield from _in_rows(one.trials, other.trials, lambda row: f"trial {row.arm}-{row.number}", first, second)
    yield from _in_rows(one.confirm, other.confirm, lambda row: f"confirm run {row.arm} seed {row.seed}", first, second)


def _in_rows(
    rows: Sequence[Row], others: Sequence[Row], name: Callable[[Row], str], first: Path, second: Path
) -> Iterator[Difference]:
    if len(rows) != len(others):
        yield Difference(where="sweep", key="number of trials", first=len(rows), second=len(others))
    for row, other in zip(rows, others, strict=False):
        where = name(row)
        yield from _in_params(where, row, other)
        yield from _in_steps(where, folder_of_run(first, row.run), folder_of_run(second, other.run))
        for key in ("state", "value"):
            yield from _differ(where, key, getattr(row, key), getattr(other, key))


def _in_params(where: str, row: TrialRow | ConfirmRow, other: TrialRow | ConfirmRow) -> Iterator[Difference]:
    if isinstance(row, ConfirmRow) or isinstance(other, ConfirmRow):
        return
    for key in sorted({*row.params, *other.params}):
        yield from _differ(where, key, row.params.get(key, MISSING), other.params.get(key, MISSING))


def _in_steps(where: str, first: Path, second: Path) -> Iterator[Difference]:
    """Losses, learning rates and evaluations, step by step; speeds differ and are left out."""
    one, other = read_values(first), read_values(second)
    for step, key in sorted({*one, *other}):
        values = one.get((step, key), MISSING), other.get((step, key), MISSING)
        yield from _differ(f"{where}, step {step}", key, *values)


def _differ(where: str, key: str, first: Any, second: Any) -> Iterator[Difference]:
    if first != second:
        yield Difference(where=where, key=key, first=first, second=second)
