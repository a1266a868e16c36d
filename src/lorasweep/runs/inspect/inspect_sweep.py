"""Inspects the winner of each arm and compares the winners' directions: `lorasweep inspect SWEEP`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.disk import csv_text, write_atomically
from lorasweep.errors import RecordError
from lorasweep.models.load import BaseModel
from lorasweep.record import get_run_folder, read_sweep
from lorasweep.runs.inspect.inspect_run import (
    FOLDER,
    SIMILARITY_FILE,
    SUMMARY_FILE,
    VERSION,
    Inspection,
    measure_run,
    read_finished_run,
    write_inspection,
)
from lorasweep.runs.inspect.measures import MEAN, Overlap, compare_subspaces
from lorasweep.runs.inspect.sentences import describe_overlaps
from lorasweep.selection import find_winners
from lorasweep.training.restore import restore_base

MAX_PAIRS = 6
"""Maximum number of pairs of winners that get a sentence; the CSV file has all pairs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepInspection:
    """Inspections of a sweep's winners."""

    inspections: Mapping[str, Inspection]
    """By arm."""
    sentences: tuple[str, ...]
    """Which arms could not be inspected and why, and φ between each two winners."""


def inspect_sweep(folder: Path) -> SweepInspection:
    """Inspects the winner of each arm, and returns all inspections.

    Writes `inspect/` into the folders of the winners and of the sweep.

    An arm without a winner, or whose weights can't be read, becomes a sentence. `frozen` arms are skipped.

    Args:
        folder: A sweep's folder.

    Raises:
        RecordError: The folder is not a sweep's, or no arm can be inspected.
        ConfigError: A base model can't be loaded.
    """
    inspections: dict[str, Inspection] = {}
    problems: list[str] = []
    bases: dict[str, BaseModel] = {}
    for arm, winner in find_winners(read_sweep(folder)).items():
        if winner is None:
            problems.append(f"Arm `{arm}` has no complete trial to inspect.")
            continue
        try:
            run = read_finished_run(get_run_folder(folder, winner.run))
            recorded = json.dumps(run.record.base, sort_keys=True)
            if recorded not in bases:  # arms on the same base share it
                bases[recorded] = restore_base(run.record, run.config)
            inspections[arm] = measure_run(run, bases[recorded])
        except RecordError as error:
            problems.append(f"Arm `{arm}` can't be inspected: {error}")
    if not inspections:
        why = f" ({problems[0]})" if problems else ""
        raise RecordError(f"a sweep must have an arm with a trained winner, but {str(folder)!r} has none{why}.")
    for inspection in inspections.values():
        write_inspection(inspection)
    overlaps = _compare_pairs(inspections)
    sentences = [
        *problems,
        *(describe_overlaps(f"`{a}`", f"`{b}`", overlaps[a, b]) for a, b in list(overlaps)[:MAX_PAIRS]),
    ]
    if len(overlaps) > MAX_PAIRS:
        sentences.append(f"`{FOLDER}/{SIMILARITY_FILE}` compares {len(overlaps) - MAX_PAIRS} more pairs of winners.")
    rows = [(*pair, *row) for pair, found in overlaps.items() for row in found if row.layer == MEAN]
    write_atomically(folder / FOLDER / SIMILARITY_FILE, csv_text(("arm", "other", *Overlap._fields), rows))
    summary = {
        "format": "lorasweep.inspections",
        "version": VERSION,
        "arms": {arm: one.run.folder.relative_to(folder).as_posix() for arm, one in inspections.items()},
        "sentences": sentences,
    }
    write_atomically(folder / FOLDER / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
    return SweepInspection(inspections=inspections, sentences=tuple(sentences))


def _compare_pairs(inspections: Mapping[str, Inspection]) -> dict[tuple[str, str], tuple[Overlap, ...]]:
    """Returns φ between each two winners of one base that trained a common layer."""
    pairs = {}
    for first, second in itertools.combinations(inspections, 2):
        bases = {inspections[arm].run.record.base.get("fingerprint") for arm in (first, second)}
        overlaps = compare_subspaces(inspections[first].directions, inspections[second].directions)
        if len(bases) == 1 and overlaps:
            pairs[first, second] = overlaps
    return pairs
