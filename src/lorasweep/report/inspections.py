"""Reads the files that `lorasweep inspect` wrote about the weights of a sweep's winners.

A winner that was not inspected is left out. An inspection that can't be read, or that is of a former winner, adds a
sentence to `SweepWeights.problems`.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lorasweep.report.sweep_data import SweepData

FOLDER = "inspect"
MAX_DIRECTIONS = 64
"""The report shows at most this many singular values."""

Overlaps = dict[tuple[int, int], float]
"""φ of the first i directions of one change and the first j of another, by (i, j)."""


@dataclass(frozen=True, kw_only=True)
class ArmWeights:
    """The inspection of an arm's winner."""

    arm: str
    run: str
    """The run's folder, relative to the sweep's."""
    spectrum: Mapping[int, float]
    """Per direction (from 1), the median over layers of the singular value over the layer's first."""
    truncation: Mapping[int, float]
    """The score by the rank to which every layer is cut; empty if it was not measured."""
    enough_rank: int | None
    """The rank whose score is as good as the whole change's."""
    share_by_kind: Mapping[str, float]
    """The share of the change's squared norm by kind of matrix, the smallest first; vectors are left out."""
    share_by_block: Mapping[int, float]
    """The share of the change's squared norm by block."""
    sentences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SweepWeights:
    """The inspections of a sweep's winners."""

    arms: tuple[ArmWeights, ...]
    similarity: Mapping[tuple[str, str], Overlaps]
    """Per pair of arms, the mean φ over layers of the directions that the changes read."""
    sentences: tuple[str, ...]
    problems: tuple[str, ...]


def load_inspections(data: SweepData) -> SweepWeights:
    """Reads the inspections of the winners, and the similarity of the winners' changes."""
    arms: list[ArmWeights] = []
    similarity: dict[tuple[str, str], Overlaps] = {}
    sentences: tuple[str, ...] = ()
    problems: list[str] = []
    winners = {arm.name: arm.best.run for arm in data.arms if arm.best}
    for name, run in winners.items():
        folder = data.folder / run / FOLDER
        try:
            if (folder / "summary.json").is_file():
                arms.append(_read_arm(name, run, folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"The inspection of `{name}` can't be read: {error!r}. Inspect it again.")
    folder = data.folder / FOLDER
    try:
        if (folder / "summary.json").is_file():
            summary = json.loads((folder / "summary.json").read_text())
            if all(winners.get(arm) == run for arm, run in summary["arms"].items()):
                sentences, similarity = tuple(summary["sentences"]), _read_similarity(folder)
            else:
                problems.append("An arm has another winner than when the sweep was inspected. Inspect it again.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"The inspection of the sweep can't be read: {error!r}. Inspect it again.")
    return SweepWeights(arms=tuple(arms), similarity=similarity, sentences=sentences, problems=tuple(problems))


def _read_arm(arm: str, run: str, folder: Path) -> ArmWeights:
    summary = json.loads((folder / "summary.json").read_text())
    spectra = json.loads((folder / "spectra.json").read_text())["singular_values"]
    kinds: dict[str, float] = defaultdict(float)
    blocks: dict[int, float] = defaultdict(float)
    for row in _read_csv(folder / "layers.csv"):
        if row["energy_rank"]:
            kinds[row["kind"]] += float(row["norm_share"])
        if row["block"]:
            blocks[int(row["block"])] += float(row["norm_share"])
    path = folder / "truncation.csv"
    return ArmWeights(
        arm=arm,
        run=run,
        spectrum=_take_median(spectra.values()),
        truncation={int(row["rank"]): float(row["score"]) for row in (_read_csv(path) if path.exists() else ())},
        enough_rank=summary["enough_rank"],
        share_by_kind=dict(sorted(kinds.items(), key=lambda item: item[1])),
        share_by_block=dict(sorted(blocks.items())),
        sentences=tuple(summary["sentences"]),
    )


def _take_median(spectra: Iterable[Sequence[float]]) -> dict[int, float]:
    relative = [[value / values[0] for value in values] for values in spectra if values and values[0]]
    longest = min(max(map(len, relative), default=0), MAX_DIRECTIONS)
    return {i + 1: median(values[i] for values in relative if len(values) > i) for i in range(longest)}


def _read_similarity(folder: Path) -> dict[tuple[str, str], Overlaps]:
    pairs: dict[tuple[str, str], Overlaps] = {}
    for row in _read_csv(folder / "similarity.csv"):
        if row["layer"] == "mean":
            pairs.setdefault((row["arm"], row["other"]), {})[int(row["i"]), int(row["j"])] = float(row["phi"])
    return pairs


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
