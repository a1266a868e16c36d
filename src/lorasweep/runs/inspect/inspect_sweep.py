"""Inspects the winner of each arm of a sweep and compares their directions: what `lorasweep inspect SWEEP` does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.errors import RecordError
from lorasweep.record import folder_of_run, read_sweep, winners
from lorasweep.runs.inspect.inspect_run import Inspected, examine
from lorasweep.runs.inspect.inspection import (
    FOLDER,
    SIMILARITY_FILE,
    SIMILARITY_HEADER,
    SUMMARY_FILE,
    VERSION,
    Inspection,
    mean_rows,
    write_csv,
    write_files,
    write_inspection,
)
from lorasweep.runs.inspect.measure import Side, compare_directions
from lorasweep.runs.inspect.restore_weights import read_finished_run
from lorasweep.runs.inspect.sentences import describe_comparison
from lorasweep.runs.inspect.subspaces import Similarity
from lorasweep.training.inputs import InputsCache, RunInputs

MAX_PAIRS = 6
"""Pairs of winners that are told of in words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepInspection:
    """What the weights of a sweep's winners say."""

    folder: Path
    inspections: Mapping[str, Inspection]
    """By arm."""
    sentences: tuple[str, ...]
    """Which arms could not be inspected and why, and what each pair of winners shares."""


def inspect_sweep(folder: Path, *, inputs: RunInputs | None = None, scores: bool = True) -> SweepInspection:
    """Inspects the winner of each arm, writes `inspect/` into its run's folder and into the sweep's, returns all.

    An arm that has no winner, or one whose weights can't be read, becomes a sentence; `frozen` arms are left out.

    Args:
        folder: A sweep's folder.
        inputs: Base model and data of all arms; loaded when None, once for arms that share them.
        scores: Whether to score changes cut to smaller ranks.

    Raises:
        RecordError: The folder is not a sweep's, or no arm can be inspected.
        ConfigError: The base model or the data cannot be had.
    """
    record = read_sweep(folder)
    found: dict[str, Inspected] = {}
    problems: list[str] = []
    inputs_cache = InputsCache()
    for arm, winner in winners(record).items():
        if winner is None:
            problems.append(f"Arm `{arm}` has no complete trial to inspect.")
            continue
        try:
            run = read_finished_run(folder_of_run(folder, winner.run))
            found[arm] = examine(run, inputs or inputs_cache.of(run.config), scores=scores)
        except RecordError as error:
            problems.append(f"Arm `{arm}` can't be inspected: {error}")
            continue
        write_inspection(found[arm].inspection)
    if not found:
        why = f" ({problems[0]})" if problems else ""
        raise RecordError(f"a sweep must have an arm with a trained winner, but {str(folder)!r} has none{why}.")
    pairs = _compare(found)
    sentences = (*problems, *_describe(pairs))
    inspection = SweepInspection(
        folder=folder, inspections={arm: one.inspection for arm, one in found.items()}, sentences=sentences
    )
    _write(inspection, pairs)
    return inspection


Pairs = dict[tuple[str, str], dict[tuple[str, Side], Similarity]]


def _compare(found: Mapping[str, Inspected]) -> Pairs:
    """The directions of each two winners that changed the same base and layers."""
    pairs: Pairs = {}
    for first, second in itertools.combinations(found, 2):
        runs = [found[arm].inspection.run.record.base.get("fingerprint") for arm in (first, second)]
        values = compare_directions(found[first].directions, found[second].directions) if runs[0] == runs[1] else {}
        if values:
            pairs[first, second] = values
    return pairs


def _describe(pairs: Pairs) -> list[str]:
    told = [describe_comparison(f"`{a}`", f"`{b}`", values) for (a, b), values in list(pairs.items())[:MAX_PAIRS]]
    more = len(pairs) - len(told)
    return [*told, f"{more} more pairs of winners are compared in {FOLDER}/{SIMILARITY_FILE}."] if more else told


def _write(inspection: SweepInspection, pairs: Pairs) -> None:
    folder = inspection.folder / FOLDER
    arms = {
        arm: one.run.folder.relative_to(inspection.folder).as_posix() for arm, one in inspection.inspections.items()
    }
    summary = {
        "format": "lorasweep.inspections",
        "version": VERSION,
        "arms": arms,
        "sentences": list(inspection.sentences),
    }
    contents = {
        SIMILARITY_FILE: write_csv(["arm", "other", *SIMILARITY_HEADER], _pair_rows(pairs)),
        SUMMARY_FILE: json.dumps(summary, indent=1) + "\n",
    }
    write_files(folder, contents)


def _pair_rows(pairs: Pairs) -> Iterator[Iterable[Any]]:
    for (first, second), values in pairs.items():
        for row in mean_rows(values):
            yield [first, second, *row]
