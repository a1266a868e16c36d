"""Compares a run or a sweep with its repetition, and lists surroundings that may explain a difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.config.compose import dotted_items
from lorasweep.record import (
    RunRecord,
    SweepRecord,
    get_run_folder,
    read_steps,
    read_sweep,
)
from lorasweep.wording import shorten

Values = Mapping[tuple[int, str], float | None]
"""Values by step and name (`loss`, `lr`, `validation loss`), in recorded order. None is NaN or infinite."""

POSSIBLE_REASONS = (
    *("data.train.fingerprint", "data.validation.fingerprint", "base.fingerprint"),
    # A pack adds in another order, which changes rounding. With `shared_draws`, its slots share the random numbers of
    # attention's dropout.
    *("pack.slots", "pack.shared_draws"),
    *("platform.precision", "platform.device", "platform.gpu", "platform.cuda", "platform.cudnn"),
    *("batching.micro_batches", "batching.attention.name", "packages.torch"),
    *("platform.processes", "platform.strategy", "platform.processor", "platform.instructions", "platform.threads"),
    *("platform.matmul_precision", "environment", "packages", "platform", "code"),
)
"""Parts of a run's record, outside its settings, that may change its losses, the most likely reason first."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A recorded value that is missing or different in the repetition."""

    step: int
    name: str
    recorded: float | None
    repeated: float | None
    is_missing: bool
    """Whether the repetition has no value at this step."""

    @property
    def relative(self) -> float:
        """The difference divided by the larger value; infinite if a value is NaN, infinite or missing."""
        if self.recorded is None or self.repeated is None:
            return math.inf
        return abs(self.recorded - self.repeated) / max(abs(self.recorded), abs(self.repeated))

    def describe(self) -> str:
        """Returns a clause: `at step 3 loss was 1.5 and is 1.6 (a relative difference of 0.0625)`."""
        repeated = "missing" if self.is_missing else _format_value(self.repeated)
        clause = f"at step {self.step} {self.name} was {_format_value(self.recorded)} and is {repeated}"
        return f"{clause} (a relative difference of {self.relative:.2g})" if self.relative < math.inf else clause


def read_values(run: Path, *, up_to: int | None = None) -> Values:
    """Returns loss and learning rate of each step of a run, and every metric of each evaluation.

    Args:
        run: The run's folder.
        up_to: The last step to return; None returns all.
    """
    values: dict[tuple[int, str], float | None] = {}
    for row in read_steps(run):
        if up_to is not None and row["step"] > up_to:
            continue
        named: dict[str, Any] = {name: row[name] for name in ("loss", "lr") if name in row}
        named |= {f"validation {name}": value for name, value in row.get("validation", {}).items()}
        for name, value in named.items():
            values[row["step"], name] = float(value) if value is not None and math.isfinite(value) else None
    return values


def list_differences(recorded: Values, repeated: Values) -> list[Difference]:
    """Returns the values that differ, in recorded order. Values that only the repetition has are ignored."""
    return [
        Difference(
            step=step,
            name=name,
            recorded=value,
            repeated=repeated.get((step, name)),
            is_missing=(step, name) not in repeated,
        )
        for (step, name), value in recorded.items()
        if (step, name) not in repeated or repeated[step, name] != value
    ]


def list_possible_reasons(recorded: RunRecord, repeated: RunRecord) -> list[str]:
    """Returns a clause for each part of the surroundings that differs, the most likely reason first."""
    before, after = _flatten_surroundings(recorded), _flatten_surroundings(repeated)
    different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    ordered = dict.fromkeys(
        name for part in POSSIBLE_REASONS for name in different if f"{name}.".startswith(f"{part}.")
    )
    return [f"`{name}` was {shorten(before.get(name))} and is {shorten(after.get(name))}" for name in ordered]


def _flatten_surroundings(record: RunRecord) -> dict[str, Any]:
    groups = {name: getattr(record, name) for name in {reason.partition(".")[0] for reason in POSSIBLE_REASONS}}
    return {name: value for name, value in dotted_items(groups) if not isinstance(value, Mapping)}


def _format_value(value: float | None) -> str:
    return "NaN or infinite" if value is None else repr(value)


@dataclass(frozen=True, kw_only=True)
class SweepReproduction:
    """The comparison of a sweep with its repetition."""

    folder: Path
    """The new sweep's folder."""
    num_runs: int
    """Number of runs of all stages: trials, and runs of the confirm stage."""
    difference: str | None
    """The first difference in a clause: trial or run, step, key and both values."""

    @property
    def holds(self) -> bool:
        """Whether the two sweeps are identical."""
        return self.difference is None

    def describe(self) -> str:
        if self.difference is None:
            return f"identical: all {self.num_runs} runs, their decisions, losses and scores: {self.folder}"
        return f"different: {self.difference}: {self.folder}"


def compare_sweeps(first: Path, second: Path) -> SweepReproduction:
    """Compares proposals, decisions, losses of every step and scores of two sweeps, trial by trial.

    Args:
        first: Folder of the sweep that was reproduced.
        second: Folder of the new sweep.

    Raises:
        RecordError: A sweep has no record, or the record is damaged.
    """
    before, after = read_sweep(first), read_sweep(second)
    parts = zip(_list_parts(before, first), _list_parts(after, second), strict=False)
    difference = next(
        (
            f"{place} was {one.get(place, 'nothing')!r} and is {other.get(place, 'nothing')!r}"
            for one, other in parts
            for place in {**one, **other}
            if one.get(place, "nothing") != other.get(place, "nothing")
        ),
        None,
    )
    return SweepReproduction(folder=second, num_runs=len(before.trials) + len(before.confirm), difference=difference)


def _list_parts(record: SweepRecord, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the values that a repetition must have too, part by part. Each value has its place in words as key."""
    keys = ("metric", "direction", "confirm_seeds")
    yield {f"sweep: `{key}`": getattr(record, key) for key in keys}
    yield {f"{row.subject}: `{key}`": value for row in record.settings for key, value in row.params.items()}
    for name, rows in (("trials", record.trials), ("confirm runs", record.confirm)):
        yield {f"sweep: `number of {name}`": len(rows)}
        for row in rows:
            is_trial = row.stage == "search"
            where = f"trial {row.arm}-{row.number}" if is_trial else f"confirm run {row.subject} seed {row.seed}"
            yield {f"{where}: `{key}`": value for key, value in row.params.items()}
            logged = read_values(get_run_folder(folder, row.run))
            yield {f"{where}, step {step}: `{key}`": logged[step, key] for step, key in sorted(logged)}
            yield {f"{where}: `{key}`": getattr(row, key) for key in ("state", "value")}
