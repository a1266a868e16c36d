"""Scrambled Sobol points, which cover an arm's space evenly."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from scipy.stats import qmc

from lorasweep.config.run import LR
from lorasweep.sweep.controller.encoding import Point, SpaceEncoding


def draw_sobol_point(encoding: SpaceEncoding, index: int, *, seed: int) -> Point:
    """Returns the point at an index of an arm's Sobol sequence.

    The coordinates equal those of Optuna's QMC sampler. That sampler draws all earlier points again for each point.

    *Differs* for choices: each of k choices appears exactly once in each group of k successive points. The point with
    the lowest coordinate of the group gets the first choice. Optuna cuts the coordinate into k equal parts, but Sobol
    points cover only 2^n parts evenly: with 6 ranks, 81 % of the sequences lack a rank in the first 6 points.
    Points cover u of the rate law where the range of the learning rate allows it, elsewhere the learning rate.
    """
    counts = {key: len(encoding.choices[key]) for key in encoding.ranges if key in encoding.choices}
    # SciPy wants a power of 2. It must include the last point of the group of k points that `index` is in.
    num_points = 1 << (index + max(counts.values(), default=1)).bit_length()
    fractions = _draw_sequence(len(encoding.ranges), seed, num_points)
    point: Point = {}
    for column, (key, range_) in enumerate(encoding.ranges.items()):
        if key in counts:
            first = index - index % counts[key]
            group = fractions[first : first + counts[key], column]
            point[key] = int((group < fractions[index, column]).sum())
        else:
            point[key] = _scale_to(range_, float(fractions[index, column]))
    if LR not in encoding.ranges:
        return point
    return encoding.move_into_range(point, float(fractions[index, list(encoding.ranges).index(LR)]))


@lru_cache
def _draw_sequence(num_keys: int, seed: int, num_points: int) -> Any:
    """Returns an array (num_points, num_keys) of numbers from 0 to 1."""
    return qmc.Sobol(num_keys, scramble=True, seed=seed).random(num_points)


def _scale_to(range_: BaseDistribution, fraction: float) -> float:
    """Returns the value at a fraction of a range's length, as Optuna's QMC sampler does."""
    assert isinstance(range_, FloatDistribution | IntDistribution)
    step = range_.step or 0
    # half a step beyond both ends, so that the values at the ends are as frequent as the others
    low, high = range_.low - step / 2, range_.high + step / 2
    if range_.log:
        value = math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
    else:
        value = low + fraction * (high - low)
    if step:
        value = round((value - range_.low) / step) * step + range_.low
    return min(max(value, range_.low), range_.high)
