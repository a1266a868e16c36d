"""The page's figures (plotly): each function takes a `SweepData` and returns a `Panel`."""

from lorasweep.report.figures.confirmed import draw_retained, draw_scores_by_value
from lorasweep.report.figures.panel import Panel, select_trials
from lorasweep.report.figures.trials import draw_learning_curves, draw_score_by_lr, draw_tradeoff
from lorasweep.report.sweep_data import SweepData

PANELS = (draw_scores_by_value, draw_score_by_lr, draw_learning_curves, draw_tradeoff)
"""The panels in the order of the page."""


def draw_panels(data: SweepData) -> list[Panel]:
    """Returns all panels, in the order of the page; of a large sweep they show a part of the trials."""
    shown = select_trials(data)
    panels = [draw(shown) for draw in PANELS]
    return [*panels, draw_retained(data)] if data.retained else panels
