"""Comparison of two trainings of one run: their step logs, and the surroundings that may explain a difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.errors import RecordError
from lorasweep.record import STEPS_FILE, RunRecord, read_steps
from lorasweep.wording import shorten

Values = Mapping[tuple[int, str], float | None]
"""Values by step and name (`loss`, `lr`, `validation loss`), in order. None stands for NaN and infinity."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A value that is not the same in both trainings."""

    step: int
    name: str
    recorded: float | None
    repeated: float | None
    is_missing: bool
    """Whether the repeated run has no such value."""

    @property
    def relative(self) -> float:
        """The difference over the larger of the two values; infinite where one is NaN, infinite or missing."""
        if self.recorded is None or self.repeated is None:
            return math.inf
        return abs(self.recorded - self.repeated) / max(abs(self.recorded), abs(self.repeated))

    def describe(self) -> str:
        """Returns it as a clause: `at step 3 loss was 1.5 and is 1.6 (a relative difference of 0.0625)`."""
        now = "missing" if self.is_missing else _number(self.repeated)
        clause = f"at step {self.step} {self.name} was {_number(self.recorded)} and is {now}"
        return f"{clause} (a relative difference of {self.relative:.2g})" if self.relative < math.inf else clause


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences between two step logs."""

    steps: int
    """Number of steps whose losses were compared."""
    evaluations: int
    first: Difference | None
    """The first difference of any size."""
    first_beyond: Difference | None
    """The first difference that is larger than the tolerance."""
    largest: Difference | None


def read_values(run: Path, *, up_to: int | None = None) -> Values:
    """Returns loss and learning rate of each step of a run, and every metric of each evaluation.

    Args:
        run: The run's folder.
        up_to: The last step to return; None returns all.

    Raises:
        RecordError: The log is damaged.
    """
    values: dict[tuple[int, str], float | None] = {}
    try:
        for row in read_steps(run):
            named: dict[str, Any] = {name: row[name] for name in ("loss", "lr") if name in row}
            named |= {f"validation {name}": value for name, value in row.get("validation", {}).items()}
            if up_to is None or row["step"] <= up_to:
                for name, value in named.items():
                    values[row["step"], name] = float(value) if value is not None and math.isfinite(value) else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = run / STEPS_FILE
        raise RecordError(f"{str(path)!r} must be a run's step log, but is damaged: {error}. Restore it.") from error
    return values


def compare_values(recorded: Values, repeated: Values, *, tolerance: float) -> Comparison:
    """Compares two logs value by value, in the recorded order.

    Args:
        recorded: Values of the run; values that it lacks are not compared.
        repeated: Values of its repetition.
        tolerance: Largest relative difference that still counts as the same; at 0 every bit counts.
    """
    differences = [
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
    return Comparison(
        steps=sum(name == "loss" for _, name in recorded),
        evaluations=len({step for step, name in recorded if name.startswith("validation ")}),
        first=differences[0] if differences else None,
        first_beyond=next((one for one in differences if one.relative > tolerance), None),
        largest=max(differences, key=lambda one: one.relative, default=None),
    )


def explain(recorded: RunRecord, repeated: RunRecord) -> list[str]:
    """Returns clauses on surroundings that differ between two trainings of one run, the most suspicious first."""
    before, now = _surroundings(recorded), _surroundings(repeated)
    clauses = []
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            clauses.append(f"{name} was {shorten(before.get(name))} and is {shorten(now.get(name))}")
    if recorded.pack is None:
        return clauses
    pack = f"it was trained in a pack of {shorten(recorded.pack.get('slots'))} and is alone now: sums round otherwise"
    if recorded.pack.get("shared_draws"):
        pack = "it was trained in a pack whose slots drew from one stream (dropout of attention) and is alone now"
    # other data or another base explain more than a pack does
    place = sum(clause.startswith(("the data", "the base")) for clause in clauses)
    return [*clauses[:place], pack, *clauses[place:]]


def _surroundings(record: RunRecord) -> dict[str, Any]:
    """Returns values that numbers may depend on, by their names in a clause, the most suspicious first."""
    platform, code, packages = record.platform, record.code, dict(record.packages)
    found = {
        f"the data split {name}'s fingerprint": record.data.get(name, {}).get("fingerprint")
        for name in ("train", "validation")
    }
    found["the base model's fingerprint"] = record.base.get("fingerprint")
    found |= {f"the {key}": platform.get(key) for key in ("precision", "device", "gpu", "cuda", "cudnn")}
    found["the number of micro-batches"] = record.batching.get("micro_batches")
    found["the attention"] = (record.batching.get("attention") or {}).get("name")
    found["package torch"] = packages.pop("torch", None)
    computing = ("processes", "strategy", "processor", "instructions", "threads", "matmul_precision")
    found |= {f"the {key}": platform.get(key) for key in computing}
    found |= {f"the variable {name}": value for name, value in record.environment.items()}
    found |= {f"package {name}": value for name, value in packages.items()}
    found |= {f"the {key}": platform.get(key) for key in ("python", "os")}
    found |= {f"the code's {key}": code.get(key) for key in ("version", "commit")}
    found["the code's patch"] = code.get("patch", {}).get("sha256")
    return found


def _number(value: float | None) -> str:
    return "NaN or infinite" if value is None else repr(value)
