"""Inspects one run, alone or beside another: what `lorasweep inspect RUN` does.

Comes after everything else of this package but `sweep`, which inspects the winners of a sweep with this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lorasweep.errors import RecordError
from lorasweep.methods import METHODS
from lorasweep.runs.inspect.changes import as_pissa_trained, weight_changes
from lorasweep.runs.inspect.inspection import Comparison, Inspection, write_inspection
from lorasweep.runs.inspect.measure import (
    Directions,
    compare_directions,
    decompose_changes,
    leading_directions,
    measure_layers,
)
from lorasweep.runs.inspect.restore_weights import (
    FinishedRun,
    read_finished_run,
    require_same_base,
    restore_trained,
    starting_model,
)
from lorasweep.runs.inspect.sentences import describe_comparison, describe_run
from lorasweep.runs.inspect.truncation import cut_changes, score_truncated
from lorasweep.training.evaluate import evaluate_model
from lorasweep.training.inputs import RunInputs, build_inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspected:
    """An inspection and the directions that other runs are compared with."""

    inspection: Inspection
    directions: Mapping[str, Directions]


def inspect_run(
    folder: Path, *, inputs: RunInputs | None = None, other: Path | None = None, scores: bool = True
) -> Inspection:
    """Inspects a run's best weights, writes `inspect/` in its folder and returns what was found.

    Args:
        folder: A run's folder.
        inputs: The run's base model and data; loaded when None.
        other: Another run of the same base, whose directions are compared.
        scores: Whether to score the change cut to smaller ranks, which evaluates some ten times.

    Raises:
        RecordError: A folder is not a run's, has no or damaged weights, or trained nothing; the bases differ.
        ConfigError: The base model or the data cannot be had.
    """
    run = read_finished_run(folder)
    rival = None if other is None else read_finished_run(other)
    if rival is not None:
        require_same_base(run, rival)
    inputs = inputs or build_inputs(run.config)
    inspected = examine(run, inputs, scores=scores)
    inspection = inspected.inspection
    if rival is not None:
        inspection = compared(inspected, examine(rival, inputs, scores=False))
    write_inspection(inspection)
    return inspection


def examine(run: FinishedRun, inputs: RunInputs, *, scores: bool) -> Inspected:
    """Measures a run and writes nothing.

    Raises:
        RecordError: Its weights are those of its base, do not fit it, or are damaged.
    """
    model = restore_trained(run, inputs.base)
    changes = weight_changes(model, starting_model(run, inputs.base))
    if getattr(run.config.method, "init", None) == "pissa":
        changes = as_pissa_trained(changes)
    if run.method == "intrinsic":
        METHODS[run.method].merge(model)  # plain weights, to be cut
    decompositions = decompose_changes(changes)
    rows = measure_layers(changes, decompositions)
    if not any(row.change_norm for row in rows):
        raise RecordError(
            f"a run must have changed its base to be inspected, but the best weights of {str(run.folder)!r} are the "
            "base's own. Name a run that trained for longer."
        )
    note = why_not_scored(run, inputs) if scores else None
    truncation = None
    if scores and note is None:
        truncation = score_truncated(
            model,
            cut_changes(changes, head=inputs.base.head),
            decompositions,
            score=lambda changed: score_model(changed, run, inputs),
            sign=1 if run.record.direction == "minimize" else -1,
        )
    inspection = Inspection(
        run=run,
        layers=rows,
        spectra={name: found.s.tolist() for name, found in decompositions.items()},
        truncation=truncation,
        comparison=None,
        sentences=describe_run(run, rows, truncation, note=note),
    )
    return Inspected(inspection=inspection, directions=leading_directions(changes, decompositions))


def compared(first: Inspected, second: Inspected) -> Inspection:
    """Returns the first run's inspection with the directions of both compared.

    Raises:
        RecordError: No matrix was changed by both.
    """
    run, other = first.inspection.run.folder, second.inspection.run.folder
    values = compare_directions(first.directions, second.directions)
    if not values:
        raise RecordError(
            f"two runs must have changed the same layers to be compared, but {str(run)!r} and {str(other)!r} have "
            "none in common. Name two runs with common `method.targets`."
        )
    sentence = describe_comparison("This run", f"`{other}`", values)
    return replace(
        first.inspection,
        comparison=Comparison(other=str(other), values=values),
        sentences=(*first.inspection.sentences, sentence),
    )


def score_model(model: nn.Module, run: FinishedRun, inputs: RunInputs) -> float:
    """Returns a model's score as the run was scored: its metric on the validation split."""
    splits = inputs.splits
    scored = evaluate_model(model, splits.validation, task=splits.task, config=run.config, precision=inputs.precision)
    return scored.values[run.record.metric]


def why_not_scored(run: FinishedRun, inputs: RunInputs) -> str | None:
    """Returns why scores would not be those of the run, or None where they are."""
    recorded = run.record.data.get("validation", {}).get("fingerprint")
    present = inputs.splits.validation.fingerprint
    if recorded == present:
        return None
    return (
        f"Smaller ranks are not scored: the run was scored on validation data with fingerprint {recorded!r}, but "
        f"the data now has {present!r}."
    )
