"""What `lorasweep inspect` wrote about the winners of a sweep, as the report reads it. Comes after `tables`.

An inspection that is missing is left out; one that can't be read, or is of a trial that is no winner any more, is a
sentence.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorasweep.report.tables import Arm, SweepData

T = TypeVar("T")

FOLDER = "inspect"
VERSION = 1
RUN_FORMAT, SWEEP_FORMAT = "lorasweep.inspection", "lorasweep.inspections"


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """One changed weight, a line of `layers.csv`."""

    layer: str
    block: int | None
    kind: str
    norm_share: float
    effective_rank: float | None


@dataclass(frozen=True, kw_only=True)
class RankScore:
    """The score of a change cut to a rank, a line of `truncation.csv`."""

    rank: int
    score: float
    kept_share: float | None


@dataclass(frozen=True, kw_only=True)
class ArmWeights:
    """What the weights of an arm's winner say."""

    arm: str
    run: str
    """The run's folder, relative to the sweep's."""
    layers: tuple[LayerChange, ...]
    spectra: Mapping[str, list[float]]
    """Singular values by layer, falling."""
    truncation: tuple[RankScore, ...]
    enough_rank: int | None
    sentences: tuple[str, ...]


Cells = dict[tuple[int, int], float]
"""φ by (i, j)."""


@dataclass(frozen=True, kw_only=True)
class SweepWeights:
    """What is known of the weights of a sweep's winners."""

    arms: tuple[ArmWeights, ...]
    similarity: Mapping[tuple[str, str], Cells]
    """Per pair of arms the mean φ over layers of the directions that the changes read."""
    sentences: tuple[str, ...]
    problems: tuple[str, ...]


class _UnreadableError(Exception):
    """A file of an inspection is damaged."""


def load_inspections(data: SweepData) -> SweepWeights:
    """Reads the inspections of the winners and of their similarity, as far as there are any."""
    arms: list[ArmWeights] = []
    problems: list[str] = []
    for arm in data.arms:
        folder = _inspected_folder(arm, data)
        if folder is None or arm.best is None:
            continue
        try:
            arms.append(_read_arm(arm.name, arm.best.run, folder))
        except _UnreadableError as error:
            problems.append(f"The inspection of `{arm.best.run}` can't be read: {error}. Inspect it again.")
    try:
        sentences, similarity = _read_sweep(data)
    except _UnreadableError as error:
        problems.append(f"The comparison of the winners' weights can't be read: {error}. Inspect the sweep again.")
        sentences, similarity = (), {}
    return SweepWeights(arms=tuple(arms), similarity=similarity, sentences=sentences, problems=tuple(problems))


def _inspected_folder(arm: Arm, data: SweepData) -> Path | None:
    if arm.best is None or arm.best.record is None:  # a run whose folder lies elsewhere has no record
        return None
    folder = data.folder / arm.best.run / FOLDER
    return folder if (folder / "summary.json").is_file() else None


def _read_arm(arm: str, run: str, folder: Path) -> ArmWeights:
    summary = _read_json(folder / "summary.json", kind=RUN_FORMAT)
    return _checked(
        lambda: ArmWeights(
            arm=arm,
            run=run,
            layers=tuple(_layer(row) for row in _read_csv(folder / "layers.csv")),
            spectra=_spectra(_read_json(folder / "spectra.json", kind=None)),
            truncation=tuple(_rank_score(row) for row in _read_csv(folder / "truncation.csv", optional=True)),
            enough_rank=None if summary["enough_rank"] is None else int(summary["enough_rank"]),
            sentences=tuple(map(str, summary["sentences"])),
        ),
        folder,
    )


def _read_sweep(data: SweepData) -> tuple[tuple[str, ...], dict[tuple[str, str], Cells]]:
    folder = data.folder / FOLDER
    if not (folder / "summary.json").is_file():
        return (), {}
    summary = _read_json(folder / "summary.json", kind=SWEEP_FORMAT)
    present = {arm.name: arm.best.run for arm in data.arms if arm.best}
    inspected = summary.get("arms")
    if not isinstance(inspected, dict) or any(present.get(arm) != run for arm, run in inspected.items()):
        return ("Since the sweep was inspected an arm has got another winner. Inspect it again.",), {}
    return _checked(lambda: (tuple(map(str, summary["sentences"])), _similarity(folder)), folder)


def _similarity(folder: Path) -> dict[tuple[str, str], Cells]:
    pairs: dict[tuple[str, str], Cells] = {}
    for row in _read_csv(folder / "similarity.csv"):
        if row["layer"] == "mean":
            pairs.setdefault((row["arm"], row["other"]), {})[int(row["i"]), int(row["j"])] = _number(row["phi"])
    return pairs


def _layer(row: Mapping[str, str]) -> LayerChange:
    return LayerChange(
        layer=row["layer"],
        block=int(row["block"]) if row["block"] else None,
        kind=row["kind"],
        norm_share=_number(row["norm_share"]),
        effective_rank=_number(row["effective_rank"]) if row["effective_rank"] else None,
    )


def _rank_score(row: Mapping[str, str]) -> RankScore:
    kept = _number(row["kept_share"]) if row["kept_share"] else None
    return RankScore(rank=int(row["rank"]), score=_number(row["score"]), kept_share=kept)


def _spectra(content: Mapping[str, Any]) -> dict[str, list[float]]:
    return {str(layer): [_number(value) for value in values] for layer, values in content["singular_values"].items()}


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def _checked(make: Callable[[], T], folder: Path) -> T:
    """Returns what `make` makes of files whose content nobody checked."""
    try:
        return make()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _UnreadableError(f"{folder} holds something else than an inspection ({error!r})") from error


def _read_json(path: Path, *, kind: str | None) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _UnreadableError(f"{path.name} is missing or damaged") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise _UnreadableError(f"{path.name} is of another kind")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise _UnreadableError(f"{path.name} is of version {content.get('version')!r}, which needs a newer lorasweep")
    return content


def _read_csv(path: Path, *, optional: bool = False) -> Iterator[Mapping[str, str]]:
    if optional and not path.exists():
        return
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _UnreadableError(f"{path.name} is missing or damaged") from error
    yield from csv.DictReader(lines)
