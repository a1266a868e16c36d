"""Inspection of one run, alone or beside another: `lorasweep inspect RUN [OTHER_RUN]`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from lorasweep.errors import RecordError
from lorasweep.methods import METHODS
from lorasweep.runs.inspect.changes import weight_changes
from lorasweep.runs.inspect.inspection import Inspection, write_inspection
from lorasweep.runs.inspect.layers import measure_layers
from lorasweep.runs.inspect.restore_weights import (
    FinishedRun,
    read_finished_run,
    require_same_base,
    restore_trained,
    starting_model,
)
from lorasweep.runs.inspect.sentences import describe_overlaps, describe_run
from lorasweep.runs.inspect.spectrum import decompose
from lorasweep.runs.inspect.subspaces import compare_subspaces, top_directions
from lorasweep.runs.inspect.truncation import changes_to_cut, score_truncated
from lorasweep.training.inputs import RunInputs, build_inputs
from lorasweep.training.score import evaluate_model


def inspect_run(
    folder: Path, *, inputs: RunInputs | None = None, other: Path | None = None, scores: bool = True
) -> Inspection:
    """Inspects a run's best weights, writes `inspect/` into its folder and returns the measurements.

    Args:
        folder: A run's folder.
        inputs: The run's base model and data; loaded when None.
        other: Folder of another run of the same base, whose directions are compared with this run's.
        scores: Whether to score the change cut to smaller ranks, which takes some ten evaluations.

    Raises:
        RecordError: A folder is not a run's, weights are missing or damaged, nothing was trained, or the bases differ.
        ConfigError: The base model or the data can't be loaded.
    """
    run = read_finished_run(folder)
    second = None if other is None else read_finished_run(other)
    if second is not None:
        require_same_base(run, second)
    inputs = inputs or build_inputs(run.config)
    inspection = measure_run(run, inputs, scores=scores)
    if second is not None:
        inspection = _compare(inspection, measure_run(second, inputs, scores=False))
    write_inspection(inspection)
    return inspection


def measure_run(run: FinishedRun, inputs: RunInputs, *, scores: bool) -> Inspection:
    """Returns the inspection of a run and writes nothing.

    Raises:
        RecordError: Its weights are its base's own, do not fit the base, or are damaged.
    """
    model = restore_trained(run, inputs.base)
    changes = weight_changes(model, starting_model(run, inputs.base))
    if getattr(run.config.method, "init", None) == "pissa":
        # An adapter of PiSSA is stored with its start subtracted, [A, A0] and [B, -B0], so with twice the trained rank.
        changes = [replace(change, rank=change.rank and change.rank // 2) for change in changes]
    if run.method == "intrinsic":
        METHODS[run.method].merge(model)  # truncation replaces plain weights
    decompositions = {change.name: decompose(change.left, change.right) for change in changes if change.is_matrix}
    layers = measure_layers(changes, decompositions)
    if not any(row.change_norm for row in layers):
        raise RecordError(
            f"a run must have changed its base to be inspected, but the best weights of {str(run.folder)!r} are the "
            "base's own. Name a run that trained for longer."
        )
    note = _why_not_scored(run, inputs) if scores else None
    truncation = None
    if scores and note is None:
        truncation = score_truncated(
            model,
            changes_to_cut(changes, head=inputs.base.head),
            decompositions,
            score=lambda cut: _score(cut, run, inputs),
            sign=1 if run.record.direction == "minimize" else -1,
        )
    return Inspection(
        run=run,
        layers=layers,
        spectra={name: found.s.tolist() for name, found in decompositions.items()},
        directions=top_directions(decompositions),
        truncation=truncation,
        sentences=describe_run(run, layers, truncation, note=note),
    )


def _compare(first: Inspection, second: Inspection) -> Inspection:
    """Returns the first run's inspection with the directions of both compared."""
    other = str(second.run.folder)
    overlaps = compare_subspaces(first.directions, second.directions)
    if not overlaps:
        raise RecordError(
            f"two runs must have changed the same layers to be compared, but {str(first.run.folder)!r} and {other!r} "
            "have none in common. Name two runs with common `method.targets`."
        )
    sentence = describe_overlaps("This run", f"`{other}`", overlaps)
    return replace(first, other=other, overlaps=overlaps, sentences=(*first.sentences, sentence))


def _score(model: nn.Module, run: FinishedRun, inputs: RunInputs) -> float:
    """Returns a model's score by the run's metric on the run's validation data."""
    splits = inputs.splits
    scored = evaluate_model(model, splits.validation, task=splits.task, config=run.config, inputs=inputs)
    return scored.values[run.record.metric]


def _why_not_scored(run: FinishedRun, inputs: RunInputs) -> str | None:
    """Returns a sentence where the validation data are not the run's, so that scores can't be compared; else None."""
    recorded = run.record.data.get("validation", {}).get("fingerprint")
    present = inputs.splits.validation.fingerprint
    if recorded == present:
        return None
    return (
        f"Smaller ranks are not scored: the run was scored on validation data with fingerprint {recorded!r}, but "
        f"the data now has {present!r}."
    )
