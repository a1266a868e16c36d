"""Figures of the winners' weights, where `lorasweep inspect` has looked at them: spectra, ranks, places, subspaces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import plotly.graph_objects as go

from lorasweep.report.figures.panel import Panel, build_figure, colours_of, escape, score_range
from lorasweep.report.inspections import ArmWeights, Cells, SweepWeights, load_inspections
from lorasweep.report.tables import SweepData

MAX_DIRECTIONS = 64
"""A spectrum shows at most this many singular values."""
MAX_PAIRS = 3
"""The page has at most this many heat maps of similarity; the CSV file has all pairs."""
MAX_KINDS = 12
"""The figure of shares shows at most this many kinds of matrix, those with the largest shares."""
SMALL_HEIGHT = 320
"""Height in pixels of a figure that stands beside others."""


def draw_weights(data: SweepData) -> Panel:
    """Returns figures of the winners' weights, as far as they were inspected."""
    title, weights = "What the weights say", load_inspections(data)
    if not weights.arms:
        text = f"The winners' weights were not looked at. Type `lorasweep inspect {data.folder}`."
        return Panel(key="weights", title=title, text=" ".join([*weights.problems, text]))
    figures = (
        _draw_spectra(weights, data),
        *_draw_truncation(weights, data),
        _draw_shares(weights, data),
        *_draw_blocks(weights, data),
        *(_draw_similarity(pair, cells, data) for pair, cells in list(weights.similarity.items())[:MAX_PAIRS]),
    )
    text = (
        "The change ΔW of each arm's best trial: its singular values (median over layers, relative to each layer's "
        "first), its score when every layer is cut to a smaller rank, and which layers carry it. Where two winners are "
        "compared, φ is the share of the smaller set of directions that the other one holds."
    )
    notes = [f"{one.arm}: {' '.join(one.sentences)} Numbers in `{one.run}/inspect/`." for one in weights.arms]
    notes += [*weights.sentences, *weights.problems]
    return Panel(
        key="weights",
        title=title,
        text=text,
        figures=figures,
        columns=("arm", "figure", "x", "y"),
        rows=tuple(_rows(weights)),
        notes=tuple(notes),
    )


def _rows(weights: SweepWeights) -> Iterable[tuple[object, ...]]:
    """Yields the data behind the figures, a row per point."""
    for one in weights.arms:
        for direction, value in enumerate(median_spectrum(one), start=1):
            yield one.arm, "spectrum", direction, value
        for row in one.truncation:
            yield one.arm, "truncation", row.rank, row.score
        for kind, share in _shares_by_kind(one).items():
            yield one.arm, "share of kind", kind, share
        for block, share in _shares_by_block(one).items():
            yield one.arm, "share of block", block, share
    for pair, cells in weights.similarity.items():
        for (i, j), value in cells.items():
            yield " and ".join(pair), "similarity", f"{i} and {j}", value


def _draw_spectra(weights: SweepWeights, data: SweepData) -> go.Figure:
    figure, colours = (
        build_figure(data, x_title="direction", y_title="singular value / first", height=SMALL_HEIGHT),
        colours_of(data),
    )
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", exponentformat="power")
    for one in weights.arms:
        values = median_spectrum(one)
        _add_line(figure, one.arm, range(1, len(values) + 1), values, colours[one.arm])
    return figure


def median_spectrum(weights: ArmWeights) -> list[float]:
    """Returns at each index the median over layers of the singular value there over the layer's first."""
    relative = [[value / values[0] for value in values] for values in weights.spectra.values() if values and values[0]]
    longest = min(max(map(len, relative), default=0), MAX_DIRECTIONS)
    return [median(values[i] for values in relative if len(values) > i) for i in range(longest)]


def _draw_truncation(weights: SweepWeights, data: SweepData) -> Iterable[go.Figure]:
    scored = [one for one in weights.arms if one.truncation]
    if not scored:
        return
    figure, colours = (
        build_figure(data, x_title="rank that every layer is cut to", height=SMALL_HEIGHT),
        colours_of(data),
    )
    ranks = sorted({row.rank for one in scored for row in one.truncation})
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=[str(rank) for rank in ranks])
    for one in scored:
        x, y = [str(row.rank) for row in one.truncation], [row.score for row in one.truncation]
        _add_line(figure, one.arm, x, y, colours[one.arm])
        enough = [row for row in one.truncation if row.rank == one.enough_rank]
        figure.add_scatter(
            x=[str(row.rank) for row in enough],
            y=[row.score for row in enough],
            mode="markers",
            showlegend=False,
            marker={"color": colours[one.arm], "symbol": "circle-open", "size": 15, "line": {"width": 2.2}},
            hovertemplate="enough: rank %{x}<extra></extra>",
        )
    figure.update_yaxes(range=score_range(data, [row.score for one in scored for row in one.truncation]))
    yield figure


def _draw_shares(weights: SweepWeights, data: SweepData) -> go.Figure:
    figure = build_figure(data, x_title="share of squared norm", y_title=" ", barmode="group", height=SMALL_HEIGHT)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    colours = colours_of(data)
    for one in weights.arms:
        shares = _shares_by_kind(one)
        kinds = list(shares)[-MAX_KINDS:]
        figure.add_bar(
            x=[shares[kind] for kind in kinds],
            y=[escape(kind) for kind in kinds],
            orientation="h",
            name=escape(one.arm),
            marker={"color": colours[one.arm]},
            hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    return figure


def _draw_blocks(weights: SweepWeights, data: SweepData) -> Iterable[go.Figure]:
    figure, colours = (
        build_figure(data, x_title="block", y_title="share of the squared norm", height=SMALL_HEIGHT),
        colours_of(data),
    )
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    for one in weights.arms:
        shares = _shares_by_block(one)
        if len(shares) > 1:
            _add_line(figure, one.arm, list(shares), list(shares.values()), colours[one.arm])
    if figure.data:
        yield figure


def _draw_similarity(pair: tuple[str, str], cells: Cells, data: SweepData) -> go.Figure:
    first, second = pair
    figure = build_figure(
        data,
        x_title=f"first j directions of {second}",
        y_title=f"first i directions of {first}",
        height=SMALL_HEIGHT,
    )
    rows, columns = sorted({i for i, _ in cells}), sorted({j for _, j in cells})
    figure.add_heatmap(
        x=[str(j) for j in columns],
        y=[str(i) for i in rows],
        z=[[cells.get((i, j)) for j in columns] for i in rows],
        zmin=0,
        zmax=1,
        hovertemplate="φ(%{y}, %{x}) = %{z:.2f}<extra></extra>",
        hoverongaps=False,
        colorscale=[[0, "#dce9f7"], [0.5, "#7db0e2"], [1, "#174a86"]],
        colorbar={"thickness": 12, "outlinewidth": 0, "title": {"text": "φ"}},
    )
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    return figure


def _add_line(figure: go.Figure, name: str, x: Sequence[int] | Sequence[str], y: Sequence[float], colour: str) -> None:
    figure.add_scatter(
        x=list(x),
        y=list(y),
        mode="lines+markers",
        name=escape(name),
        line={"color": colour, "width": 2},
        marker={"size": 5},
        hovertemplate=f"{escape(name)}, %{{x}}: %{{y:.3~g}}<extra></extra>",
    )


def _shares_by_kind(weights: ArmWeights) -> dict[str, float]:
    """Returns the share of the squared norm by kind of matrix, the smallest first."""
    shares: dict[str, float] = {}
    for row in weights.layers:
        if row.effective_rank is not None:
            shares[row.kind] = shares.get(row.kind, 0.0) + row.norm_share
    return dict(sorted(shares.items(), key=lambda item: item[1]))


def _shares_by_block(weights: ArmWeights) -> dict[int, float]:
    shares: dict[int, float] = {}
    for row in weights.layers:
        if row.block is not None:
            shares[row.block] = shares.get(row.block, 0.0) + row.norm_share
    return dict(sorted(shares.items()))
