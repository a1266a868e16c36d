"""Advice from a sweep: values that were not tried, and where to search next."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lorasweep.config.ranges import find_bounds
from lorasweep.report.sweep_data import RANK, ArmData, SweepData, TrialData
from lorasweep.wording import format_setting, join_words

EDGE_FRACTION = 0.05
"""A value is at an end of its range if it is closer to the end than this share of the range."""


def describe_untried(data: SweepData) -> list[str]:
    """Returns a sentence for each list of choices of which no complete trial has some."""
    untried: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for arm in data.searches:
        for key, values in arm.untried.items():
            if key != arm.row.confirm_each:  # the search's model predicts these values from the others
                untried[key, values].append(f"`{arm.name}`")
    return [
        f"Nothing is known about `{key}` {join_words(values, last='or')}: no complete trial of "
        f"{join_words(arms)} has it."
        for (key, values), arms in untried.items()
    ]


def describe_edges(data: SweepData) -> list[str]:
    """Returns a sentence for each key whose best value lies at an end of its range."""
    edges: dict[tuple[str, str], list[tuple[str, Any]]] = defaultdict(list)
    trials = {arm.name: arm.trials for arm in data.searches}
    for arm in data.arms:
        for key, end in find_best_edges(arm, trials[arm.arm]).items():
            if arm.best:
                edges[key, end].append((arm.name, arm.best.params[key]))
    sentences = []
    for (key, end), bests in edges.items():
        arms = join_words([f"`{name}` ({format_setting(value)})" for name, value in bests])
        direction = "lower" if end == "lower" else "higher"
        sentences.append(
            f"The best `{key}` of {arms} lies at the {end} end of its range: search {direction} values too."
        )
    return sentences


def find_best_edges(arm: ArmData, trials: Sequence[TrialData]) -> dict[str, str]:
    """Returns the swept keys whose value in the best trial lies at an end of its range: `lower` or `upper` by key.

    A key is left out if no complete trial of the whole arm lies away from that end: then nothing shows that the end is
    better.
    """
    complete = [_find_edges(arm, trial) for trial in trials if trial.is_complete]
    edges = _find_edges(arm, arm.best) if arm.best else {}
    return {key: end for key, end in edges.items() if any(others.get(key) != end for others in complete)}


def _find_edges(arm: ArmData, trial: TrialData) -> dict[str, str]:
    ends = {key: _find_end(arm.row.space.get(key), trial.numeric_setting(key)) for key in trial.params}
    # No rank is lower than 1, so there is nothing to search below it.
    return {key: end for key, end in ends.items() if end and not (key == RANK and trial.params[key] == 1)}


def _find_end(space: Any, value: float | None) -> str | None:
    bounds = find_bounds(space)
    if value is None or bounds is None or (bounds.is_log and value <= 0):
        return None
    low, high = bounds.low, bounds.high
    position = math.log(value / low) / math.log(high / low) if bounds.is_log else (value - low) / (high - low)
    # In a list of choices only the smallest and the largest are at an end.
    margin = 0.0 if isinstance(space, list) else EDGE_FRACTION
    return "lower" if position <= margin else "upper" if position >= 1 - margin else None
