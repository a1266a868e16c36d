"""Figures of the winners' weights, from the files that `lorasweep inspect` wrote: spectra, ranks, layers, similarity.

A winner that was not inspected is skipped. An inspection that can't be read adds a sentence.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import plotly.graph_objects as go

from lorasweep.report.figures.panel import (
    Panel,
    add_bars,
    add_heat_map,
    add_line,
    add_ring,
    build_figure,
    choose_colours,
    escape,
    find_score_range,
)
from lorasweep.report.sweep_data import SweepData

FOLDER = "inspect"
MAX_DIRECTIONS = 64
"""The figure of spectra shows at most this many singular values."""
MAX_PAIRS = 3
"""The page has at most this many heat maps of similarity; `inspect/similarity.csv` has all pairs."""
MAX_KINDS = 12
"""The figure of shares shows at most this many kinds of matrix: those with the largest shares."""
SMALL_HEIGHT_PX = 320

Overlaps = dict[tuple[int, int], float]
"""φ of the first i directions of one weight update and the first j of another, by (i, j)."""


@dataclass(frozen=True, kw_only=True)
class ArmWeights:
    """The inspection of an arm's winner."""

    arm: str
    spectrum: Mapping[int, float]
    """Per direction (from 1), the median over layers of the singular value over the layer's first."""
    truncation: Mapping[int, float]
    """The score by the rank to which every layer is cut; empty if it was not measured."""
    enough_rank: int | None
    """The rank whose score is as good as the whole weight update's."""
    share_by_kind: Mapping[str, float]
    """The share of the squared norm by kind of matrix, the smallest first; vectors are skipped."""
    share_by_block: Mapping[int, float]
    sentences: tuple[str, ...]


def draw_weights(data: SweepData) -> Panel:
    """Returns figures of the winners' weights, if they were inspected."""
    title, arms, notes = "Weights of the winners", [], []
    similarity: dict[tuple[str, str], Overlaps] = {}
    winners = {arm.name: arm.best.run for arm in data.arms if arm.best}
    try:
        for name, run in winners.items():
            if (data.folder / run / FOLDER / "summary.json").is_file():
                arms.append(read_arm(name, data.folder / run / FOLDER))
                notes.append(f"{name}: {' '.join(arms[-1].sentences)} Numbers in `{run}/{FOLDER}/`.")
        if (data.folder / FOLDER / "summary.json").is_file():
            summary = json.loads((data.folder / FOLDER / "summary.json").read_text())
            if all(winners.get(arm) == run for arm, run in summary["arms"].items()):
                notes += summary["sentences"]
                similarity = read_similarity(data.folder / FOLDER)
            else:
                notes.append("An arm has another winner than when the sweep was inspected. Inspect it again.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"An inspection can't be read: {error!r}. Inspect the sweep again.")
    if not arms:
        text = f"The winners' weights were not inspected. Type `lorasweep inspect {data.folder}`."
        return Panel(key="weights", title=title, text=" ".join([*notes, text]))
    return Panel(
        key="weights",
        title=title,
        text=(
            "The weight update ΔW of each arm's best trial: its singular values (median over layers, relative to each "
            "layer's first), its score when every layer is cut to a smaller rank, and its share by kind of matrix and "
            "by block. For two winners, φ is the share of the smaller set of directions that the other set holds."
        ),
        figures=(
            *_draw_spectra(arms, data),
            *_draw_truncation(arms, data),
            _draw_kinds(arms, data),
            *_draw_blocks(arms, data),
            *(_draw_similarity(pair, found, data) for pair, found in list(similarity.items())[:MAX_PAIRS]),
        ),
        notes=tuple(notes),
    )


def read_arm(arm: str, folder: Path) -> ArmWeights:
    """Reads the inspection of a winner."""
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
        spectrum=_take_median(spectra.values()),
        truncation={int(row["rank"]): float(row["score"]) for row in (_read_csv(path) if path.exists() else ())},
        enough_rank=summary["enough_rank"],
        share_by_kind=dict(sorted(kinds.items(), key=lambda item: item[1])),
        share_by_block=dict(sorted(blocks.items())),
        sentences=tuple(summary["sentences"]),
    )


def read_similarity(folder: Path) -> dict[tuple[str, str], Overlaps]:
    """Reads, per pair of arms, the mean φ over layers of the directions that the weight updates read."""
    pairs: dict[tuple[str, str], Overlaps] = defaultdict(dict)
    for row in _read_csv(folder / "similarity.csv"):
        if row["layer"] == "mean":
            pairs[row["arm"], row["other"]][int(row["i"]), int(row["j"])] = float(row["phi"])
    return pairs


def _take_median(spectra: Iterable[Sequence[float]]) -> dict[int, float]:
    relative = [[value / values[0] for value in values] for values in spectra if values and values[0]]
    longest = min(max(map(len, relative), default=0), MAX_DIRECTIONS)
    return {i + 1: median(values[i] for values in relative if len(values) > i) for i in range(longest)}


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _draw_lines(
    arms: Sequence[ArmWeights], data: SweepData, points: Callable[[ArmWeights], Mapping[Any, float]], **titles: str
) -> Iterable[go.Figure]:
    """Yields a figure with a line per arm, or nothing if no arm has two points."""
    figure, colours = build_figure(data, **titles, height=SMALL_HEIGHT_PX), choose_colours(data)
    for one in arms:
        found = points(one)
        if len(found) > 1:
            hover = f"{escape(one.arm)}, %{{x}}: %{{y:.3~g}}<extra></extra>"
            look = {"mode": "lines+markers", "marker": {"size": 5}, "showlegend": True, "hoverinfo": None}
            add_line(figure, [*found], [*found.values()], colours[one.arm], one.arm, hovertemplate=hover, **look)
    if figure.data:
        yield figure


def _draw_spectra(arms: Sequence[ArmWeights], data: SweepData) -> Iterable[go.Figure]:
    titles = {"x_title": "direction", "y_title": "singular value / first"}
    for figure in _draw_lines(arms, data, lambda one: one.spectrum, **titles):
        figure.update_xaxes(type="log")
        figure.update_yaxes(type="log", exponentformat="power")
        yield figure


def _draw_truncation(arms: Sequence[ArmWeights], data: SweepData) -> Iterable[go.Figure]:
    def points(one: ArmWeights) -> dict[str, float]:
        return {str(rank): score for rank, score in one.truncation.items()}

    for figure in _draw_lines(arms, data, points, x_title="rank that every layer is cut to (ring: enough)"):
        ranks = sorted({rank for one in arms for rank in one.truncation})
        # Ranks are categories, since they begin at 0, which a logarithmic axis can't show.
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=[str(rank) for rank in ranks])
        for one in arms:
            if one.enough_rank is not None:
                score = one.truncation[one.enough_rank]
                add_ring(figure, str(one.enough_rank), score, choose_colours(data)[one.arm], one.arm)
        figure.update_yaxes(range=find_score_range(data, [score for one in arms for score in one.truncation.values()]))
        yield figure


def _draw_kinds(arms: Sequence[ArmWeights], data: SweepData) -> go.Figure:
    titles = {"x_title": "share of squared norm", "y_title": " "}
    figure, colours = build_figure(data, **titles, barmode="group", height=SMALL_HEIGHT_PX), choose_colours(data)
    for one in arms:
        add_bars(figure, [*one.share_by_kind.items()][-MAX_KINDS:], colours[one.arm], one.arm)
    return figure


def _draw_blocks(arms: Sequence[ArmWeights], data: SweepData) -> Iterable[go.Figure]:
    titles = {"x_title": "block", "y_title": "share of the squared norm"}
    for figure in _draw_lines(arms, data, lambda one: one.share_by_block, **titles):
        figure.update_yaxes(tickformat=".0%", rangemode="tozero")
        yield figure


def _draw_similarity(pair: tuple[str, str], found: Overlaps, data: SweepData) -> go.Figure:
    titles = {"x_title": f"first j directions of {pair[1]}", "y_title": f"first i directions of {pair[0]}"}
    figure = build_figure(data, **titles, height=SMALL_HEIGHT_PX)
    rows, columns = sorted({i for i, _ in found}), sorted({j for _, j in found})
    grid = [[found.get((i, j)) for j in columns] for i in rows]
    hover = "φ(%{y}, %{x}) = %{z:.2f}<extra></extra>"
    x, y = [str(j) for j in columns], [str(i) for i in rows]
    bar = {"title": {"text": "φ"}}
    add_heat_map(figure, x, y, grid, zmin=0, zmax=1, reversescale=True, hovertemplate=hover, colorbar=bar)
    return figure
