"""Best values at an end of their range, beyond which nothing was tried. Only complete trials count."""

from __future__ import annotations

import math
from typing import Any

from lorasweep.config.ranges import find_bounds
from lorasweep.report.advice.noise import near_best, tolerance_of
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.wording import format_setting, join_words

EDGE_FRACTION = 0.05
"""A value closer to an end of its range than this share of the range counts as at the end."""


def describe_edges(data: SweepData) -> list[str]:
    """Returns a sentence for each key whose best value lies at an end of its range: where to search next.

    An arm gets none for an end if no complete trial lies away from it, so that nothing shows that the end is better,
    or if a trial that lies away from it is as good, as far as the confirm stage tells the noise.
    """
    found: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for arm in data.arms:
        for key, end in edges_of(arm, arm.best).items() if arm.best else ():
            if arm.best and _is_supported(arm, key, end, data):
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


def _is_supported(arm: Arm, key: str, end: str, data: SweepData) -> bool:
    """Whether complete trials away from the end are there, and none of them is as good as the best."""
    away = [trial for trial in arm.trials if trial.is_complete and edges_of(arm, trial).get(key) != end]
    tolerance = tolerance_of(arm, data)
    as_good = near_best(arm, data, tolerance) if tolerance and tolerance.is_measured else []
    return bool(away) and not any(trial in as_good for trial in away)


def edges_of(arm: Arm, trial: Trial) -> dict[str, str]:
    """Returns the swept keys whose value in that trial lies at an end of its range, and which: `lower` or `upper`."""
    ends = {key: _edge(arm.row.space.get(key), trial.number_at(key)) for key in trial.params}
    # no rank is lower than 1
    return {key: end for key, end in ends.items() if end and not (key == "method.rank" and trial.params[key] == 1)}


def _edge(searched: Any, value: float | None) -> str | None:
    bounds = find_bounds(searched)
    if value is None or bounds is None or (bounds.is_log and value <= 0):
        return None
    low, high = bounds.low, bounds.high
    position = math.log(value / low) / math.log(high / low) if bounds.is_log else (value - low) / (high - low)
    # a choice lies at an end only if it is the smallest or the largest
    margin = 0.0 if isinstance(searched, list) else EDGE_FRACTION
    return "lower" if position <= margin else "upper" if position >= 1 - margin else None
