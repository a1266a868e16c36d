"""The page's figures (plotly): each function takes a `SweepData` and returns a `Panel`."""

from collections.abc import Callable

from lorasweep.report.figures.confirmed import draw_confirmed
from lorasweep.report.figures.panel import Panel
from lorasweep.report.figures.settings import draw_rank_alpha
from lorasweep.report.figures.trials import draw_learning_curves, draw_score_by_lr, draw_score_by_rank, draw_tradeoff
from lorasweep.report.figures.weights import draw_weights
from lorasweep.report.sweep_data import SweepData

PANELS: tuple[Callable[[SweepData], Panel], ...] = (
    draw_confirmed,
    draw_score_by_rank,
    draw_rank_alpha,
    draw_score_by_lr,
    draw_learning_curves,
    draw_tradeoff,
    draw_weights,
)
"""The panels in the order of the page."""
