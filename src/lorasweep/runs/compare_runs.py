"""Two trainings of one run held against each other: step by step, and what of their surroundings differs.

Works on what is on disk alone; `reproduce` trains the second one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.errors import RecordError
from lorasweep.record import STEPS_FILE, RunRecord, read_steps

MAX_SHOWN = 60
"""Letters of a value that a record holds; it may hold anything."""

Values = Mapping[tuple[int, str], float | None]
"""By step and name (`loss`, `lr`, `validation loss`), in the order of the steps. None stands for NaN or infinity."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that is not the same in both."""

    step: int
    name: str
    recorded: float | None
    repeated: float | None
    is_missing: bool = False
    """Whether the repeated run has no such value."""

    @property
    def relative(self) -> float:
        """The difference over the larger of the two; infinite where one is NaN, infinite or missing."""
        if self.recorded is None or self.repeated is None:
            return math.inf
        return abs(self.recorded - self.repeated) / max(abs(self.recorded), abs(self.repeated))

    def describe(self) -> str:
        """Returns it as a clause: `at step 3 loss was 1.5 and is 1.6 (a relative difference of 0.0625)`."""
        if self.is_missing:
            return f"at step {self.step} {self.name} was {_number(self.recorded)} and is missing"
        values = f"at step {self.step} {self.name} was {_number(self.recorded)} and is {_number(self.repeated)}"
        return f"{values} (a relative difference of {self.relative:.2g})" if self.relative < math.inf else values


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two step logs have in common."""

    steps: int
    """Steps whose losses were compared."""
    evaluations: int
    first: Difference | None
    """The first difference of any size."""
    first_beyond: Difference | None
    """The first one that is larger than the tolerance."""
    largest: Difference | None


def read_values(run: Path, *, up_to: int | None = None) -> Values:
    """Returns what a run logged: loss and learning rate of each step, every metric of each evaluation.

    Args:
        run: Its folder.
        up_to: The last step to return; None returns all.

    Raises:
        RecordError: The log is damaged.
    """
    path, values = run / STEPS_FILE, dict[tuple[int, str], float | None]()
    try:
        for row in read_steps(run):
            for step, name, value in _read_row(row):
                if up_to is None or step <= up_to:
                    values[step, name] = value
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{str(path)!r} must be a run's step log, but is damaged: {error}.") from error
    return values


def compare_values(recorded: Values, repeated: Values, *, tolerance: float) -> Comparison:
    """Compares two logs value by value, in the recorded order.

    Args:
        recorded: Of the run; what it lacks is not compared.
        repeated: Of its repetition.
        tolerance: Largest relative difference that still counts as the same; at 0 every bit counts.
    """
    differences = []
    for (step, name), value in recorded.items():
        again = repeated.get((step, name))
        is_missing = (step, name) not in repeated
        if is_missing or again != value:
            differences.append(Difference(step=step, name=name, recorded=value, repeated=again, is_missing=is_missing))
    return Comparison(
        steps=sum(name == "loss" for _, name in recorded),
        evaluations=len({step for step, name in recorded if name.startswith("validation ")}),
        first=differences[0] if differences else None,
        first_beyond=next((one for one in differences if one.relative > tolerance), None),
        largest=max(differences, key=lambda one: one.relative, default=None),
    )


def explain(recorded: RunRecord, repeated: RunRecord) -> list[str]:
    """Returns what may explain that two trainings of one run differ, a clause each, the most suspicious first."""
    pairs = [
        *_differing("the data part", _fingerprints(recorded.data), _fingerprints(repeated.data)),
        *_differing("the base model's", recorded.base, repeated.base, keys=("fingerprint",)),
        *_describe_pack(recorded),
        *_differing("the", recorded.platform, repeated.platform, keys=("precision", "device", "gpu", "cuda", "cudnn")),
        *_differing("of batches", _batching(recorded), _batching(repeated)),
        *_differing("package", recorded.packages, repeated.packages, keys=("torch",)),
        *_differing(
            "the",
            recorded.platform,
            repeated.platform,
            keys=("processes", "strategy", "processor", "instructions", "threads", "matmul_precision"),
        ),
    ]
    pairs += _differing("the variable", recorded.environment, repeated.environment, everything=True)
    others = tuple(name for name in recorded.packages if name != "torch")
    pairs += _differing("package", recorded.packages, repeated.packages, keys=others)
    pairs += _differing("the", recorded.platform, repeated.platform, keys=("python", "os"))
    pairs += _differing("the code's", _code(recorded), _code(repeated), everything=True)
    return pairs


def _read_row(row: Any) -> Iterator[tuple[int, str, float | None]]:
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"a row is {str(row)[:MAX_SHOWN]!r}")
    validation = row.get("validation", {})
    if not isinstance(validation, dict):
        raise ValueError(f"a row has {str(validation)[:MAX_SHOWN]!r} of validation")
    named = {name: row[name] for name in ("loss", "lr") if name in row}
    named |= {f"validation {name}": value for name, value in validation.items()}
    for name, value in named.items():
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ValueError(f"a {name[:MAX_SHOWN]} is {str(value)[:MAX_SHOWN]!r}")
        yield row["step"], name, float(value) if value is not None and math.isfinite(value) else None


def _differing(
    what: str,
    recorded: Mapping[str, Any],
    repeated: Mapping[str, Any],
    *,
    keys: tuple[str, ...] | None = None,
    everything: bool = False,
) -> list[str]:
    """What differs under each key that the run recorded; with `everything` also under those that only the other has."""
    names = keys or tuple(dict.fromkeys([*recorded, *(repeated if everything else ())]))
    return [
        f"{what} {name} was {_shown(recorded.get(name))} and is {_shown(repeated.get(name))}"
        for name in names
        if (name in recorded or everything) and recorded.get(name) != repeated.get(name)
    ]


def _describe_pack(recorded: RunRecord) -> list[str]:
    if recorded.pack is None:
        return []
    clauses = [
        f"it was trained in a pack of {_shown(recorded.pack.get('slots'))} and is alone now: sums round otherwise"
    ]
    if recorded.pack.get("shared_draws"):
        clauses.insert(0, "it was trained in a pack whose slots drew from one stream (dropout of attention), alone now")
    return clauses


def _fingerprints(data: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: part for name, part in data.items() if name in ("train", "validation")}
    return {f"{name}'s fingerprint": part.get("fingerprint") for name, part in parts.items() if isinstance(part, dict)}


def _batching(record: RunRecord) -> dict[str, Any]:
    attention = record.batching.get("attention")
    named = attention.get("name") if isinstance(attention, dict) else None
    return {"micro_batches": record.batching.get("micro_batches"), "attention": named}


def _code(record: RunRecord) -> dict[str, Any]:
    patch = record.code.get("patch")
    described = {name: record.code[name] for name in ("version", "commit") if name in record.code}
    return described | ({"patch": patch.get("sha256")} if isinstance(patch, dict) else {})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _number(value: float | None) -> str:
    return "NaN or infinite" if value is None else repr(value)
