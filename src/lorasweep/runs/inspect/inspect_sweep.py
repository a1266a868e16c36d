"""Inspection of the winner of each arm, and of the directions that winners share: `lorasweep inspect SWEEP`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.disk import csv_text
from lorasweep.errors import RecordError
from lorasweep.record import folder_of_run, read_sweep, winners
from lorasweep.runs.inspect.inspect_run import measure_run
from lorasweep.runs.inspect.inspection import (
    FOLDER,
    SIMILARITY_FILE,
    SUMMARY_FILE,
    VERSION,
    Inspection,
    write_files,
    write_inspection,
)
from lorasweep.runs.inspect.restore_weights import read_finished_run
from lorasweep.runs.inspect.sentences import describe_overlaps
from lorasweep.runs.inspect.subspaces import MEAN, Overlap, compare_subspaces
from lorasweep.training.inputs import InputsCache, RunInputs

MAX_PAIRS = 6
"""At most this many pairs of winners have a sentence; the CSV file has all pairs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepInspection:
    """Inspections of a sweep's winners."""

    folder: Path
    inspections: Mapping[str, Inspection]
    """By arm."""
    sentences: tuple[str, ...]
    """Which arms could not be inspected and why, and φ between each two winners."""


def inspect_sweep(folder: Path, *, inputs: RunInputs | None = None, scores: bool = True) -> SweepInspection:
    """Inspects the winner of each arm, writes `inspect/` into its run's folder and the sweep's, and returns all.

    An arm without a winner, or whose weights can't be read, becomes a sentence; `frozen` arms are left out.

    Args:
        folder: A sweep's folder.
        inputs: Base model and data of all arms; when None they are loaded, once for arms that share them.
        scores: Whether to score changes cut to smaller ranks.

    Raises:
        RecordError: The folder is not a sweep's, or no arm can be inspected.
        ConfigError: The base model or the data can't be loaded.
    """
    found: dict[str, Inspection] = {}
    problems: list[str] = []
    inputs_cache = InputsCache()
    for arm, winner in winners(read_sweep(folder)).items():
        if winner is None:
            problems.append(f"Arm `{arm}` has no complete trial to inspect.")
            continue
        try:
            run = read_finished_run(folder_of_run(folder, winner.run))
            found[arm] = measure_run(run, inputs or inputs_cache.of(run.config), scores=scores)
        except RecordError as error:
            problems.append(f"Arm `{arm}` can't be inspected: {error}")
        else:
            write_inspection(found[arm])
    if not found:
        why = f" ({problems[0]})" if problems else ""
        raise RecordError(f"a sweep must have an arm with a trained winner, but {str(folder)!r} has none{why}.")
    pairs = _compare_pairs(found)
    told = [describe_overlaps(f"`{a}`", f"`{b}`", overlaps) for (a, b), overlaps in list(pairs.items())[:MAX_PAIRS]]
    if more := len(pairs) - len(told):
        told.append(f"{more} more pairs of winners are compared in {FOLDER}/{SIMILARITY_FILE}.")
    inspection = SweepInspection(folder=folder, inspections=found, sentences=(*problems, *told))
    _write(inspection, pairs)
    return inspection


def _compare_pairs(found: Mapping[str, Inspection]) -> dict[tuple[str, str], tuple[Overlap, ...]]:
    """Returns φ between each two winners that changed the same base and some of the same layers."""
    pairs = {}
    for first, second in itertools.combinations(found, 2):
        bases = {found[arm].run.record.base.get("fingerprint") for arm in (first, second)}
        overlaps = compare_subspaces(found[first].directions, found[second].directions)
        if len(bases) == 1 and overlaps:
            pairs[first, second] = overlaps
    return pairs


def _write(inspection: SweepInspection, pairs: Mapping[tuple[str, str], tuple[Overlap, ...]]) -> None:
    rows = [(*pair, *row) for pair, overlaps in pairs.items() for row in overlaps if row.layer == MEAN]
    summary = {
        "format": "lorasweep.inspections",
        "version": VERSION,
        "arms": {
            arm: one.run.folder.relative_to(inspection.folder).as_posix() for arm, one in inspection.inspections.items()
        },
        "sentences": list(inspection.sentences),
    }
    contents: dict[str, str | None] = {
        SIMILARITY_FILE: csv_text(("arm", "other", *Overlap._fields), rows),
        SUMMARY_FILE: json.dumps(summary, indent=1) + "\n",
    }
    write_files(inspection.folder / FOLDER, contents)
