"""Judges whether a sweep treated its arms alike, and whether the search found each arm's best setting.

`sweep.definition.warnings` warns about the plan before the first trial. This module judges the result. Confirm runs
don't count: they choose nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from operator import itemgetter
from typing import Any

from lorasweep.config.method import ALPHA_OVER_RANK
from lorasweep.config.ranges import MAX_WIDTH_DIFFERENCE_DECADES, find_bounds, width_in_decades
from lorasweep.config.run import ALPHA, LR, RANK
from lorasweep.record import Trial
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import format_count, format_setting, join_words

MAX_EFFORT_RATIO = 1.25
"""Maximum ratio of the tokens of two arms that count as treated alike."""
EDGE_FRACTION = 0.05
"""A value is at an end of its range if it is closer to the end than this share of the range."""


def judge_fairness(data: SweepData, *, has_learned: bool = True) -> dict[str, Any]:
    """Returns whether arms had equal trials, similar tokens and ranges, and whether their searches found the best.

    A search did not find the best if the best learning rate lies at an end of its range, or if the expected regret
    exceeds the margin.

    Returns:
        `is_fair` (None if fewer than two arms train), `sentences`, and `arms`, the `measure_effort` of each arm.
    """
    arms = [measure_effort(arm, data) for arm in data.searches if arm.row.method != "frozen"]
    edges = list_edges(data) if has_learned else []
    others = [f"{clause[0].upper()}{clause[1:]}." for key, clause in edges if key != LR or len(arms) < 2]
    if len(arms) < 2:
        return {"is_fair": None, "sentences": others, "arms": arms}
    faults, ranges = [clause for key, clause in edges if key == LR], []
    for measure, unit, show, max_ratio, max_difference in (
        ("trials_asked", "trials", str, 1.0, 0.0),
        ("tokens_trained", "tokens", format_count, MAX_EFFORT_RATIO, 0.0),
        ("lr_decades", "decades of learning rates", "{:.1f}".format, 1.0, MAX_WIDTH_DIFFERENCE_DECADES),
        ("dimensions", "searched dimensions", str, 1.0, math.inf),  # shown, but no fault
    ):
        least, most = min(arms, key=itemgetter(measure)), max(arms, key=itemgetter(measure))
        low, high = show(least[measure]), show(most[measure])
        counted = f"{low} {unit.removesuffix('s') if low == '1' else unit}"
        ranges.append(counted if low == high else f"{low} to {high} {unit}")
        if most[measure] > max_ratio * least[measure] + max_difference:
            faults.append(f"`{least['arm']}` had {counted} and `{most['arm']}` {high}")
    margin = data.evidence.margin
    regrets = {row.subject: row.regret / margin for row in data.record.settings if margin and row.regret is not None}
    if above := [f"{regret:.2g} margins for `{subject}`" for subject, regret in regrets.items() if regret > 1]:
        luck = "so luck of the search may decide"
        faults.append(f"an untried setting is expected to be better by {join_words(above)}, {luck}")
    so_far = "" if data.record.status == "complete" else "so far "
    judgement = f"not fair: {'; '.join(faults)}" if faults else "fair"
    sentences = [
        f"The comparison of arms is {so_far}{judgement}.",
        f"Each of the {len(arms)} arms that train had {join_words(ranges)}.",
        *others,
    ]
    return {"is_fair": not faults, "sentences": sentences, "arms": arms}


def measure_effort(arm: ArmData, data: SweepData) -> dict[str, Any]:
    """Returns the trials and tokens that the search spent on an arm, and its expected regret.

    `tokens_trained` counts all trials, complete or not. `lr_decades` is the width of the range of learning rates, 0 if
    it is not searched. `dimensions` is the number of searched keys; under the rate law, learning rate and α count as
    one key. `regret` is how much better an untried setting is expected to be, in the metric's unit: the largest of the
    arm's subjects, None if it is not known.
    """
    keys = set(arm.row.space)
    if LR in keys and any(trial.follows_rate_law for trial in arm.trials):
        keys -= {ALPHA, ALPHA_OVER_RANK}
    settings = [one.setting for one in data.arms if one.arm == arm.name and one.setting]
    return {
        "arm": arm.name,
        "trials_asked": arm.row.trials,
        "tokens_trained": sum(trial.record.tokens_trained for trial in arm.trials if trial.record),
        "lr_decades": width_in_decades(arm.row.space.get(LR)) or 0.0,
        "dimensions": len(keys),
        "regret": max((one.regret for one in settings if one.regret is not None), default=None),
    }


def list_edges(data: SweepData) -> list[tuple[str, str]]:
    """Returns each key whose best value lies at an end of its range, with a clause that says so.

    A key is left out if all trials with a score lie at that end, because no trial shows that others are worse.
    """
    trials = {arm.name: [trial for trial in arm.trials if trial.value is not None] for arm in data.searches}
    edges: dict[tuple[str, str], list[str]] = defaultdict(list)
    for arm in data.arms:
        for key, value in (arm.best.params if arm.best else {}).items():
            if key in (ALPHA, ALPHA_OVER_RANK) and arm.best and arm.best.follows_rate_law:
                continue  # under the rate law, another α only means another learning rate
            end = _find_end(arm, key, arm.best)
            if end and any(_find_end(arm, key, trial) != end for trial in trials[arm.arm]):
                edges[key, end].append(f"`{arm.name}` ({format_setting(value)})")
    return [
        (
            key,
            f"the best `{key}` of {join_words(arms)} lies at the {end} end of its range, so "
            f"{'lower' if end == 'lower' else 'higher'} values may be better",
        )
        for (key, end), arms in edges.items()
    ]


def _find_end(arm: ArmData, key: str, trial: Trial | None) -> str | None:
    """Returns `lower` or `upper` if a trial's value lies at that end of the arm's range, else None."""
    space = arm.row.space.get(key)
    value, bounds = trial.numeric_setting(key) if trial else None, find_bounds(space)
    if value is None or bounds is None or (bounds.is_log and value <= 0) or (key == RANK and value == 1):
        return None  # no rank is lower than 1, so there is nothing to search below it
    low, high = bounds.low, bounds.high
    position = math.log(value / low) / math.log(high / low) if bounds.is_log else (value - low) / (high - low)
    # In a list of choices only the smallest and the largest are at an end.
    margin = 0.0 if isinstance(space, list) else EDGE_FRACTION
    return "lower" if position <= margin else "upper" if position >= 1 - margin else None
