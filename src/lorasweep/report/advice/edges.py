"""Best values at an end of their range, so that a better value may lie outside. Only complete trials count."""

from __future__ import annotations

import math
from typing import Any

from lorasweep.config.ranges import find_bounds
from lorasweep.report.advice.tolerance import find_tolerance, near_best
from lorasweep.report.sweep_data import RANK, ArmData, SweepData, TrialData
from lorasweep.wording import format_setting, join_words

EDGE_FRACTION = 0.05
"""A value is at an end of its range if it is closer to the end than this share of the range."""


def describe_edges(data: SweepData) -> list[str]:
    """Returns a sentence for each key whose best value lies at an end of its range: where to search next.

    An arm is left out if no complete trial lies away from that end, so that nothing shows that the end is better, or
    if such a trial is as good as the best within the noise that the confirm stage measured.
    """
    found: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for arm in data.arms:
        for key, end in find_edges(arm, arm.best).items() if arm.best else ():
            if arm.best and _is_supported(arm, key, end, data):
                found.setdefault((key, end), []).append((arm.name, arm.best.params[key]))
    sentences = []
    for (key, end), bests in found.items():
        arms = join_words([f"`{name}`" for name, _ in bests])
        values = {format_setting(value) for _, value in bests}
        value = f", {values.pop()}," if len(values) == 1 else ""
        direction = "lower" if end == "lower" else "higher"
        sentences.append(
            f"The best `{key}` of {arms}{value} lies at the {end} end of its range: search {direction} values too."
        )
    return sentences


def find_edges(arm: ArmData, trial: TrialData) -> dict[str, str]:
    """Returns the swept keys whose value in the trial lies at an end of its range, with that `lower` or `upper` end."""
    ends = {key: _find_end(arm.row.space.get(key), trial.number_at(key)) for key in trial.params}
    # No rank is lower than 1, so there is nothing to search below it.
    return {key: end for key, end in ends.items() if end and not (key == RANK and trial.params[key] == 1)}


def _is_supported(arm: ArmData, key: str, end: str, data: SweepData) -> bool:
    """Returns whether complete trials lie away from the end and none of them is as good as the best."""
    away = [trial for trial in arm.trials if trial.is_complete and find_edges(arm, trial).get(key) != end]
    tolerance = find_tolerance(arm, data)
    as_good = near_best(arm, data, tolerance) if tolerance and tolerance.is_measured else []
    return bool(away) and not any(trial in as_good for trial in away)


def _find_end(searched: Any, value: float | None) -> str | None:
    bounds = find_bounds(searched)
    if value is None or bounds is None or (bounds.is_log and value <= 0):
        return None
    low, high = bounds.low, bounds.high
    position = math.log(value / low) / math.log(high / low) if bounds.is_log else (value - low) / (high - low)
    # In a list of choices only the smallest and the largest are at an end.
    margin = 0.0 if isinstance(searched, list) else EDGE_FRACTION
    return "lower" if position <= margin else "upper" if position >= 1 - margin else None
