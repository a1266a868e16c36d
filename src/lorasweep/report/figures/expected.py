"""Figure of the expected best score of n trials per arm (Dodge et al. 2019, arXiv 1909.03004, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lorasweep.report.figures.panel import Panel, add_line, build_figure, choose_colours, set_score_axis
from lorasweep.report.sweep_data import SweepData

MIN_TRIALS = 3
"""An arm with fewer trials has no curve."""
BOOTSTRAP_DRAWS = 500
BOOTSTRAP_SEED = 20190903
BAND_PERCENTILES = (2.5, 97.5)

Array = npt.NDArray[np.float64]


def draw_expected_best(data: SweepData) -> Panel:
    """Returns the expected best validation score over the number of trials, with a band, for each arm."""
    title = "Expected best of n trials"
    scores = {arm.name: [t.value for t in arm.trials if t.value is not None] for arm in data.arms}
    scores = {name: values for name, values in scores.items() if len(values) >= MIN_TRIALS}
    if not scores:
        return Panel(key="expected", title=title, text=f"No arm has scores of {MIN_TRIALS} trials.")
    figure, colours = build_figure(data, x_title="trials"), choose_colours(data)
    shown: list[float] = []
    for name, values in scores.items():
        trials = list(range(1, len(values) + 1))
        expected, low, high = (line.tolist() for line in estimate_expected_best(values, sign=data.sign))
        band: dict[str, Any] = {"fill": "toself", "opacity": 0.15, "line": {"width": 0}}
        add_line(figure, [*trials, *trials[::-1]], [*high, *low[::-1]], colours[name], name, **band)
        add_line(figure, trials, expected, colours[name], name, showlegend=True, hoverinfo="x+y+name")
        shown += expected
    cut = set_score_axis(figure, data, shown)
    text = (
        "The best validation score to expect from a search of n trials (Dodge et al. 2019). Bands hold 95 % of the "
        "curves of resampled trials. Trials that were stopped early count with their best score so far. The formula "
        "is for independent trials, but an adaptive sampler learns from earlier trials, so the curve is "
        "a rough guide."
        f"{cut}"
    )
    return Panel(key="expected", title=title, text=text, figures=(figure,))


def estimate_expected_best(scores: Sequence[float], *, sign: int) -> tuple[Array, Array, Array]:
    """Returns the expected best of 1 to N trials drawn from N scores, and the lower and upper end of its band.

    Args:
        scores: The score of each trial.
        sign: 1 if lower scores are better, else -1.
    """
    values = np.asarray(scores)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    resampled = rng.choice(values, size=(BOOTSTRAP_DRAWS, len(values)))
    low, high = np.percentile(_expect_best(resampled, sign=sign), BAND_PERCENTILES, axis=0)
    return _expect_best(values[None], sign=sign)[0], low, high


def _expect_best(samples: Array, *, sign: int) -> Array:
    """Returns (samples, N) expected bests of 1 to N trials, from (samples, N) scores.

    The best of n draws is the i-th score from the worst with probability (i/N)^n - ((i - 1)/N)^n.
    """
    count = samples.shape[1]
    worst_first = sign * np.sort(sign * samples, axis=1)[:, ::-1]
    cumulative = np.arange(count + 1)[:, None] / count
    probabilities = np.diff(cumulative ** np.arange(1, count + 1), axis=0)  # (scores, trials)
    best: Array = worst_first @ probabilities
    return best
