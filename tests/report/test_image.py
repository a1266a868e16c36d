"""The page's figures as PNG images."""

from __future__ import annotations

import io
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lorasweep.report.figures.image import draw_png

RED = "#ff0000"


def count_red(draw: Callable[[go.Figure], object]) -> int:
    """Returns the number of red pixels in the image of a figure."""
    figure = go.Figure(layout={"height": 200})
    figure.add_scatter(x=[0, 4], y=[0, 4], mode="lines", line={"color": "#000000"})
    draw(figure)
    png = draw_png(figure, title="title")
    assert png is not None
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int(((pixels[..., 0] > 200) & (pixels[..., 1:].max(axis=-1) < 60)).sum())


def add_line(figure: go.Figure, *, y: list[float | None]) -> None:
    figure.add_scatter(x=[0, 1, 2, 3, 4], y=y, mode="lines", line={"color": RED}, showlegend=False)


@pytest.mark.parametrize(
    "draw",
    [
        lambda figure: figure.add_scatter(x=[2], y=[2], mode="markers", marker={"color": RED, "size": 9}),
        lambda figure: figure.add_scatter(
            x=[2], y=[2], mode="markers", marker={"color": RED, "size": 16, "symbol": "diamond-open"}
        ),
        lambda figure: figure.add_bar(x=[3], y=["a"], orientation="h", name="arm", marker={"color": RED}),
        lambda figure: figure.add_heatmap(z=[[1]], x=["1"], y=["1"], colorscale=[[0, RED], [1, RED]]),
        lambda figure: figure.add_hline(y=2, line={"color": RED}),
        lambda figure: figure.add_vline(x=2, line={"color": RED}),
        lambda figure: figure.add_hrect(y0=1, y1=2, fillcolor=RED, opacity=1),
        lambda figure: figure.add_vrect(x0=1, x1=2, fillcolor=RED, opacity=1),
        lambda figure: figure.add_hline(y=9, annotation={"text": "MMMM", "font": {"color": RED}}),
    ],
)
def test_every_part_of_a_figure_is_drawn(draw: Callable[[go.Figure], object]) -> None:
    assert count_red(lambda figure: None) == 0
    assert count_red(draw) > 10


def test_none_interrupts_a_line() -> None:
    whole = count_red(lambda figure: add_line(figure, y=[1, 1, 1, 1, 1]))
    interrupted = count_red(lambda figure: add_line(figure, y=[1, 1, None, 1, 1]))
    assert 0.4 * whole < interrupted < 0.6 * whole


def test_labels_of_a_logarithmic_axis_are_numbers_and_not_formulas() -> None:
    figure = go.Figure(layout={"height": 200})
    figure.add_scatter(x=[0.001, 0.1], y=[0, 1], mode="markers", marker={"color": RED})
    figure.update_xaxes(type="log")
    with patch.object(Figure, "savefig", autospec=True) as save:
        draw_png(figure, title="title")
    labels = [label.get_text() for label in save.call_args.args[0].axes[0].get_xticklabels()]
    assert "0.01" in labels
    assert not any("$" in label for label in labels)


def test_dollars_in_a_name_are_no_formula() -> None:
    figure = go.Figure(layout={"height": 200})
    figure.add_scatter(x=[0], y=[0], mode="markers", marker={"color": RED}, name=r"$\wrong{$", showlegend=True)
    assert draw_png(figure, title=r"$\wrong{$")
