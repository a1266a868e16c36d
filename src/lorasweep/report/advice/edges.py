"""Best values at the end of their range, beyond which nothing was tried."""

from __future__ import annotations

import math
from typing import Any

from lorasweep.report.advice.noise import near_best, tolerance_of
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.wording import format_setting, join_words

EDGE_FRACTION = 0.05
"""A value this close to an end of its range, as a share of the range, counts as at the edge."""


def describe_edges(data: SweepData) -> list[str]:
    """Returns a sentence for each key whose best value lies at an end of its range: where to search next.

    Left out are arms with trials that are as good away from that end, as far as the confirm stage tells the noise.
    """
    found: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for arm in data.arms:
        for key, end in edges_of(arm, arm.best).items() if arm.best else ():
            if arm.best and not _is_chance(arm, key, end, data):
                found.setdefault((key, end), []).append((arm.name, arm.best.params[key]))
    return [_sentence(key, end, places) for (key, end), places in found.items()]


def _sentence(key: str, end: str, places: list[tuple[str, Any]]) -> str:
    arms = join_words([f"`{name}`" for name, _ in places])
    values = {format_setting(value) for _, value in places}
    value = f", {values.pop()}," if len(values) == 1 else ""
    return (
        f"The best `{key}` of {arms}{value} lies at the {end} end of its range: "
        f"search {'lower' if end == 'lower' else 'higher'} values too."
    )


def _is_chance(arm: Arm, key: str, end: str, data: SweepData) -> bool:
    tolerance = tolerance_of(arm, data)
    if tolerance is None or not tolerance.is_measured:
        return False
    return any(edges_of(arm, trial).get(key) != end for trial in near_best(arm, data, tolerance))


def edges_of(arm: Arm, trial: Trial) -> dict[str, str]:
    """Returns the swept keys whose value in that trial lies at an end of its range, and which: `lower` or `upper`."""
    ends = {key: _edge(arm.row.space.get(key), trial.number_at(key)) for key in trial.params}
    # no rank is lower than 1
    return {key: end for key, end in ends.items() if end and not (key == "method.rank" and trial.params[key] == 1)}


def _edge(space: Any, value: float | None) -> str | None:
    bounds = _bounds(space)
    if value is None or bounds is None:
        return None
    low, high, is_log = bounds
    if is_log and value <= 0:
        return None
    position = (math.log(value / low) / math.log(high / low)) if is_log else (value - low) / (high - low)
    margin = 0.0 if isinstance(space, list) else EDGE_FRACTION
    return "lower" if position <= margin else "upper" if position >= 1 - margin else None


def _bounds(space: Any) -> tuple[float, float, bool] | None:
    if isinstance(space, dict):
        return _bounds_of([space.get("low"), space.get("high")], is_log=bool(space.get("log")))
    return _bounds_of(space if isinstance(space, list) else [], is_log=False)


def _bounds_of(values: list[Any], *, is_log: bool) -> tuple[float, float, bool] | None:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) != len(values) or len(set(numbers)) < 2:
        return None
    return min(numbers), max(numbers), is_log and min(numbers) > 0
