"""Draws the page's figures as PNG images with matplotlib, because plotly would need a browser for it."""

from __future__ import annotations

import html
import io
import math
from typing import Any

import plotly.graph_objects as go
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, StrMethodFormatter

WIDTH_INCHES = 6.0
"""Narrow, so that the text is large beside the figure: TensorBoard shows images about 350 pixels wide."""
PAGE_PIXELS_PER_INCH = 100
"""Turns a figure's height in the page, in pixels, into that of its image."""
PIXELS_PER_INCH = 150
DASHES = {"dot": ":", "dash": "--"}
MARKERS = {"x-thin-open": "x", "diamond-open": "D"}
"""Plotly's symbols that are not circles, by matplotlib's names."""
GREY = "#868e96"


@rc_context({"text.parse_math": False})  # a "$" in a name is no formula
def draw_png(figure: go.Figure, *, title: str) -> bytes:
    """Returns a figure as a PNG image."""
    layout = figure.layout
    canvas = Figure(figsize=(WIDTH_INCHES, layout.height / PAGE_PIXELS_PER_INCH + 0.4), layout="constrained")
    axes = canvas.subplots()
    for trace in figure.data:
        {"scatter": _draw_scatter, "bar": _draw_bars, "heatmap": _draw_heat_map}[trace.type](axes, trace)
    for shape in layout.shapes:
        _draw_shape(axes, shape)
    across = axes.get_yaxis_transform()  # x as a fraction of the width, y as a score
    for note in layout.annotations:  # the names of lines across the figure
        anchors = {"ha": note.xanchor, "va": note.yanchor}
        axes.text(note.x, note.y, f" {note.text} ", transform=across, color=note.font.color, **anchors)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(color=GREY, alpha=0.2)
    axes.set_axisbelow(True)
    for name, axis in (("x", layout.xaxis), ("y", layout.yaxis)):
        text = html.unescape(axis.title.text or "").replace(" (log scale)", "")
        settings: dict[str, Any] = {f"{name}label": text}
        if axis.type == "log":
            settings[f"{name}scale"] = "log"
        if axis.tickvals:
            settings |= {f"{name}ticks": axis.tickvals, f"{name}ticklabels": axis.ticktext}
        if axis.type == "category":
            settings[f"{name}margin"] = 0.3
        if axis.range:
            settings[f"{name}lim"] = axis.range
        axes.set(**settings)
        drawn = getattr(axes, f"{name}axis")
        if axis.tickvals:
            drawn.set_minor_locator(NullLocator())  # after the scale, which sets its own
        elif axis.type == "log":  # matplotlib's own labels of powers are formulas
            drawn.set_major_formatter(StrMethodFormatter("{x:g}"))
        elif (axis.tickformat or "").endswith("%"):
            drawn.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}%"))
    if layout.xaxis.nticks:
        axes.locator_params(axis="x", nbins=layout.xaxis.nticks)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=PIXELS_PER_INCH)
    return buffer.getvalue()


def _draw_scatter(axes: Axes, trace: Any) -> None:
    y = [math.nan if value is None else value for value in trace.y]
    colour = trace.marker.color or trace.line.color
    axes.plot(
        trace.x,
        y,
        color=colour,
        alpha=trace.opacity or trace.marker.opacity,
        linestyle=DASHES.get(trace.line.dash, "-") if "lines" in trace.mode else "none",
        linewidth=trace.line.width,
        drawstyle="steps-post" if trace.line.shape == "hv" else "default",
        marker=MARKERS.get(trace.marker.symbol, "o") if "markers" in trace.mode else None,
        markersize=trace.marker.size and 0.7 * trace.marker.size,
        markerfacecolor="none" if (trace.marker.symbol or "").endswith("-open") else None,
        label=html.unescape(trace.name) if trace.showlegend else None,
    )


def _draw_bars(axes: Axes, trace: Any) -> None:
    # Rows of several arms have the same names in the page, where they stand side by side.
    rows = [html.unescape(f"{trace.name}: {row}") for row in trace.y]
    axes.barh(rows, trace.x, color=trace.marker.color, alpha=0.8)


def _draw_heat_map(axes: Axes, trace: Any) -> None:
    grid = [[math.nan if value is None else value for value in row] for row in trace.z]
    colours = LinearSegmentedColormap.from_list("", [tuple(stop) for stop in trace.colorscale])
    image = axes.imshow(
        grid,
        cmap=colours.reversed() if trace.reversescale else colours,
        vmin=trace.zmin,
        vmax=trace.zmax,
        aspect="auto",
        origin="lower",
    )
    axes.set(xticks=range(len(trace.x)), xticklabels=trace.x, yticks=range(len(trace.y)), yticklabels=trace.y)
    axes.figure.colorbar(image)
    for row, texts in enumerate(trace.text if trace.texttemplate else ()):
        for column, text in enumerate(texts):
            axes.text(column, row, text, ha="center", va="center", backgroundcolor="#ffffffb0", fontsize=9)


def _draw_shape(axes: Axes, shape: Any) -> None:
    """Draws a line or a band across the whole figure."""
    if shape.type == "rect":
        look = {"color": shape.fillcolor, "alpha": shape.opacity, "linewidth": 0}
        if shape.yref.endswith("domain"):  # all of the height
            axes.axvspan(shape.x0, shape.x1, **look)
        else:
            axes.axhspan(shape.y0, shape.y1, **look)
        return
    draw, position = (axes.axhline, shape.y0) if shape.y0 == shape.y1 else (axes.axvline, shape.x0)
    draw(position, color=shape.line.color, linewidth=shape.line.width, linestyle=DASHES.get(shape.line.dash, "-"))
