"""The page's figures (plotly): each function takes a `SweepData` and returns a `Panel`."""

from collections.abc import Callable

from lorasweep.report.figures.panel import Panel
from lorasweep.report.figures.scores_by_value import draw_scores_by_value
from lorasweep.report.figures.tested import draw_tested
from lorasweep.report.figures.trials import draw_learning_curves, draw_score_by_lr, draw_tradeoff
from lorasweep.report.sweep_data import SweepData

PANELS: tuple[Callable[[SweepData], Panel], ...] = (
    draw_scores_by_value,
    draw_tested,
    draw_score_by_lr,
    draw_learning_curves,
    draw_tradeoff,
)
"""The panels in the order of the page."""
