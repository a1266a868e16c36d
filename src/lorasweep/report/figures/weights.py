"""Figures of the winners' weights, if `lorasweep inspect` was run: spectra, ranks, layers and similarity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import plotly.graph_objects as go

from lorasweep.report.figures.panel import (
    Panel,
    add_bars,
    add_heat_map,
    add_line,
    add_ring,
    build_figure,
    colours_of,
    escape,
    score_range,
)
from lorasweep.report.inspections import ArmWeights, Overlaps, SweepWeights, load_inspections
from lorasweep.report.sweep_data import SweepData

MAX_PAIRS = 3
"""The page has at most this many heat maps of similarity; the CSV file has all pairs."""
MAX_KINDS = 12
"""The figure of shares shows at most this many kinds of matrix: those with the largest shares."""
SMALL_HEIGHT_PX = 320


def draw_weights(data: SweepData) -> Panel:
    """Returns figures of the winners' weights, if they were inspected."""
    title, weights = "Weights of the winners", load_inspections(data)
    if not weights.arms:
        text = f"The winners' weights were not inspected. Type `lorasweep inspect {data.folder}`."
        return Panel(key="weights", title=title, text=" ".join([*weights.problems, text]))
    notes = [f"{one.arm}: {' '.join(one.sentences)} Numbers in `{one.run}/inspect/`." for one in weights.arms]
    return Panel(
        key="weights",
        title=title,
        text=(
            "The change ΔW of each arm's best trial: its singular values (median over layers, relative to each layer's "
            "first), its score when every layer is cut to a smaller rank, and its share by kind of matrix and by "
            "block. For two winners, φ is the share of the smaller set of directions that the other one holds."
        ),
        figures=(
            *_draw_spectra(weights, data),
            *_draw_truncation(weights, data),
            _draw_kinds(weights, data),
            *_draw_blocks(weights, data),
            *(_draw_similarity(pair, found, data) for pair, found in list(weights.similarity.items())[:MAX_PAIRS]),
        ),
        columns=("arm", "figure", "x", "y"),
        rows=tuple(_list_points(weights)),
        notes=(*notes, *weights.sentences, *weights.problems),
    )


def _list_points(weights: SweepWeights) -> Iterable[tuple[object, ...]]:
    """Yields the data behind the figures, a row per point."""
    for one in weights.arms:
        for figure, points in (
            ("spectrum", one.spectrum),
            ("truncation", one.truncation),
            ("share of kind", one.share_by_kind),
            ("share of block", one.share_by_block),
        ):
            yield from ((one.arm, figure, x, y) for x, y in points.items())
    for pair, found in weights.similarity.items():
        yield from ((" and ".join(pair), "similarity", f"{i} and {j}", phi) for (i, j), phi in found.items())


def _draw_lines(
    weights: SweepWeights, data: SweepData, points: Callable[[ArmWeights], Mapping[Any, float]], **titles: str
) -> Iterable[go.Figure]:
    """Yields a figure with a line per arm, or nothing if no arm has two points."""
    figure, colours = build_figure(data, **titles, height=SMALL_HEIGHT_PX), colours_of(data)
    for one in weights.arms:
        found = points(one)
        if len(found) > 1:
            hover = f"{escape(one.arm)}, %{{x}}: %{{y:.3~g}}<extra></extra>"
            look = {"mode": "lines+markers", "marker": {"size": 5}, "showlegend": True, "hoverinfo": None}
            add_line(figure, [*found], [*found.values()], colours[one.arm], one.arm, hovertemplate=hover, **look)
    if figure.data:
        yield figure


def _draw_spectra(weights: SweepWeights, data: SweepData) -> Iterable[go.Figure]:
    titles = {"x_title": "direction", "y_title": "singular value / first"}
    for figure in _draw_lines(weights, data, lambda one: one.spectrum, **titles):
        figure.update_xaxes(type="log")
        figure.update_yaxes(type="log", exponentformat="power")
        yield figure


def _draw_truncation(weights: SweepWeights, data: SweepData) -> Iterable[go.Figure]:
    def points(one: ArmWeights) -> dict[str, float]:
        return {str(rank): score for rank, score in one.truncation.items()}

    for figure in _draw_lines(weights, data, points, x_title="rank that every layer is cut to"):
        ranks = sorted({rank for one in weights.arms for rank in one.truncation})
        # Ranks are categories, since they begin at 0, which a logarithmic axis can't show.
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=[str(rank) for rank in ranks])
        for one in weights.arms:
            enough, hover = (
                str(one.enough_rank),
                {"hovertemplate": "enough: rank %{x}<extra></extra>", "hoverinfo": None},
            )
            if enough in points(one):
                add_ring(figure, enough, points(one)[enough], colours_of(data)[one.arm], one.arm, **hover)
        figure.update_yaxes(
            range=score_range(data, [score for one in weights.arms for score in one.truncation.values()])
        )
        yield figure


def _draw_kinds(weights: SweepWeights, data: SweepData) -> go.Figure:
    titles = {"x_title": "share of squared norm", "y_title": " "}
    figure, colours = build_figure(data, **titles, barmode="group", height=SMALL_HEIGHT_PX), colours_of(data)
    for one in weights.arms:
        add_bars(figure, [*one.share_by_kind.items()][-MAX_KINDS:], colours[one.arm], one.arm)
    return figure


def _draw_blocks(weights: SweepWeights, data: SweepData) -> Iterable[go.Figure]:
    for figure in _draw_lines(
        weights, data, lambda one: one.share_by_block, x_title="block", y_title="share of the squared norm"
    ):
        figure.update_yaxes(tickformat=".0%", rangemode="tozero")
        yield figure


def _draw_similarity(pair: tuple[str, str], found: Overlaps, data: SweepData) -> go.Figure:
    titles = {"x_title": f"first j directions of {pair[1]}", "y_title": f"first i directions of {pair[0]}"}
    figure = build_figure(data, **titles, height=SMALL_HEIGHT_PX)
    rows, columns = sorted({i for i, _ in found}), sorted({j for _, j in found})
    grid = [[found.get((i, j)) for j in columns] for i in rows]
    bar = {"thickness": 12, "outlinewidth": 0, "title": {"text": "φ"}}
    hover = "φ(%{y}, %{x}) = %{z:.2f}<extra></extra>"
    x, y = [str(j) for j in columns], [str(i) for i in rows]
    add_heat_map(figure, x, y, grid, zmin=0, zmax=1, reversescale=True, hovertemplate=hover, colorbar=bar)
    return figure
