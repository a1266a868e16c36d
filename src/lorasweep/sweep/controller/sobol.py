"""Scrambled Sobol points, which cover an arm's space evenly."""

from __future__ import annotations

import math
from functools import lru_cache

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import qmc

from lorasweep.sweep.controller.encoding import Point
from lorasweep.sweep.definition.space import Space

NUM_POINTS_DRAWN = 256
"""Number of points that are drawn at once. SciPy wants a power of 2."""
MAX_CACHED_BLOCKS = 1024
"""Number of blocks of drawn points that are kept in memory, of all arms together."""


class SobolSequence:
    """The Sobol points of one arm, in which every choice is equally frequent.

    The coordinates are those of Optuna's QMC sampler, which would draw all earlier points again for each point.

    Of k successive points, each of k choices has exactly one: they are assigned in the order of the points'
    coordinates. A cut of the coordinate into k equal parts would not do that, because Sobol points are even over 2^n
    parts: with 6 ranks a rank is missing in the first 6 points of 81 % of the sequences, and in the first 12 of 6 %.
    """

    def __init__(self, ranges: Space, *, choices: frozenset[str], seed: int) -> None:
        """Takes the range of each key, the keys whose range is that of a list's positions, and the seed."""
        self._num_choices = {key: _count_positions(ranges[key]) for key in ranges if key in choices}
        self._ranges = tuple(
            (key, FloatDistribution(0.0, 1.0) if key in choices else range_) for key, range_ in ranges.items()
        )
        self._seed = seed

    def point(self, index: int) -> Point:
        """Returns the point at an index, from 0."""
        point = dict(self._coordinates(index))
        for key, count in self._num_choices.items():
            first = index - index % count
            group = [self._coordinates(member)[key] for member in range(first, first + count)]
            point[key] = sorted(range(count), key=group.__getitem__).index(index - first)
        return point

    def _coordinates(self, index: int) -> Point:
        block, place = divmod(index, NUM_POINTS_DRAWN)
        return _draw_block(self._ranges, self._seed, block)[place]


@lru_cache(maxsize=MAX_CACHED_BLOCKS)
def _draw_block(ranges: tuple[tuple[str, BaseDistribution], ...], seed: int, block: int) -> list[Point]:
    engine = qmc.Sobol(len(ranges), scramble=True, seed=seed)
    if block:
        engine.fast_forward(block * NUM_POINTS_DRAWN)
    return [
        {key: _scale_to(range_, float(at)) for (key, range_), at in zip(ranges, row, strict=True)}
        for row in engine.random(NUM_POINTS_DRAWN)
    ]


def _scale_to(range_: BaseDistribution, fraction: float) -> float:
    """Returns the value of a range at a fraction of its length, as Optuna's QMC sampler does."""
    assert isinstance(range_, FloatDistribution | IntDistribution)
    step = range_.step or 0
    low, high = range_.low - 0.5 * step, range_.high + 0.5 * step
    if range_.log:
        low, high = math.log(low), math.log(high)
    value = low + fraction * (high - low)
    value = math.exp(value) if range_.log else value
    if isinstance(range_, IntDistribution):
        nearest = round(value) if range_.log else math.floor((value - range_.low) / step + 0.5) * step + range_.low
        return min(max(nearest, range_.low), range_.high)
    if step:
        nearest = round((value - range_.low) / step) * step + range_.low
        return min(max(nearest, range_.low), range_.high)
    return min(max(value, range_.low), math.nextafter(range_.high, range_.high - 1))


def _count_positions(range_: BaseDistribution) -> int:
    if isinstance(range_, IntDistribution):
        return range_.high + 1
    assert isinstance(range_, CategoricalDistribution)
    return len(range_.choices)
