"""Planned looks: the levels at which the confirm stage may test its questions several times.

To test after each further seed until something is settled would raise the chance of a false verdict from 2.5 to 7.4 %
with 3 to 10 seeds. The looks are stated before the first result, and each of them tests at a lower level (Pocock 1977,
Biometrika 64).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

GRID_POINTS = 801
LOWEST_SCORE = -8.0
"""Standard normal scores below this have no weight."""


@functools.cache
def compute_look_level(looks: tuple[int, ...], *, level: float) -> float:
    """Returns the one-sided level of each look, so that all looks together have the level.

    The boundary is Pocock's, for statistics whose increments are independent and whose information is the number of
    seeds. An error that is the same at all looks, such as that of the test examples, makes them more alike, so the
    whole level is then lower.

    Args:
        looks: Numbers of seeds at the looks, ascending.
        level: The one-sided level of all looks together.
    """
    if len(looks) == 1:
        return level
    boundary = brentq(lambda bound: _compute_crossing(looks, bound) - level, 0.0, 8.0, xtol=1e-6)
    return float(norm.sf(boundary))


def _compute_crossing(looks: Sequence[int], boundary: float) -> float:
    """Returns the probability that a standard normal score exceeds the boundary at any look.

    Integrates the density of paths below the boundary from look to look (Armitage, McPherson and Rowe 1969).
    """
    times = np.array(looks) / looks[-1]
    crossed = float(norm.sf(boundary))
    limit = boundary * times[0] ** 0.5
    nodes = np.linspace(LOWEST_SCORE * times[0] ** 0.5, limit, GRID_POINTS)
    density = norm.pdf(nodes, scale=times[0] ** 0.5)
    for earlier, later in itertools.pairwise(times):
        spread, limit = (later - earlier) ** 0.5, boundary * later**0.5
        crossed += float(np.trapezoid(density * norm.sf(limit, loc=nodes, scale=spread), nodes))
        further = np.linspace(LOWEST_SCORE * later**0.5, limit, GRID_POINTS)
        steps = norm.pdf(further[:, None], loc=nodes[None], scale=spread)
        density, nodes = np.trapezoid(density[None] * steps, nodes, axis=1), further
    return crossed
