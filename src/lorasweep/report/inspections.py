"""Reads the files that `lorasweep inspect` wrote about the weights of a sweep's winners.

A winner that was not inspected is left out. An inspection that can't be read, or that is of a former winner, adds a
sentence to `SweepWeights.problems`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.report.sweep_data import SweepData

FOLDER = "inspect"

Overlaps = dict[tuple[int, int], float]
"""φ of the first i directions of one change and the first j of another, by (i, j)."""


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """One changed weight: a line of `layers.csv`."""

    block: int | None
    kind: str
    norm_share: float
    effective_rank: float | None


@dataclass(frozen=True, kw_only=True)
class RankScore:
    """The score of a change that is cut to a rank: a line of `truncation.csv`."""

    rank: int
    score: float


@dataclass(frozen=True, kw_only=True)
class ArmWeights:
    """The inspection of an arm's winner."""

    arm: str
    run: str
    """The run's folder, relative to the sweep's."""
    layers: tuple[LayerChange, ...]
    spectra: Mapping[str, list[float]]
    """The singular values of each layer, falling."""
    truncation: tuple[RankScore, ...]
    enough_rank: int | None
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
    has_truncation = (folder / "truncation.csv").exists()
    return ArmWeights(
        arm=arm,
        run=run,
        layers=tuple(
            LayerChange(
                block=int(row["block"]) if row["block"] else None,
                kind=row["kind"],
                norm_share=float(row["norm_share"]),
                effective_rank=float(row["effective_rank"]) if row["effective_rank"] else None,
            )
            for row in _read_csv(folder / "layers.csv")
        ),
        spectra=json.loads((folder / "spectra.json").read_text())["singular_values"],
        truncation=tuple(
            RankScore(rank=int(row["rank"]), score=float(row["score"]))
            for row in (_read_csv(folder / "truncation.csv") if has_truncation else ())
        ),
        enough_rank=summary["enough_rank"],
        sentences=tuple(summary["sentences"]),
    )


def _read_similarity(folder: Path) -> dict[tuple[str, str], Overlaps]:
    pairs: dict[tuple[str, str], Overlaps] = {}
    for row in _read_csv(folder / "similarity.csv"):
        if row["layer"] == "mean":
            pairs.setdefault((row["arm"], row["other"]), {})[int(row["i"]), int(row["j"])] = float(row["phi"])
    return pairs


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
