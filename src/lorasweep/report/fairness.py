"""Judges whether a sweep treated its arms alike, and whether the search found each arm's best setting.

`sweep.definition.warnings` warns about the plan before the first trial. This module judges the result. Confirm runs
don't count: they choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorasweep.config.method import ALPHA_OVER_RANK
from lorasweep.config.ranges import MAX_WIDTH_DIFFERENCE_DECADES, width_in_decades
from lorasweep.config.run import ALPHA, LR
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import format_count, format_share, join_words

MAX_EFFORT_RATIO = 1.25
"""Maximum ratio of the tokens or complete trials of two arms that count as treated alike."""
MAX_COMPLETE_TRIALS_DIFFERENCE = 2
"""Maximum difference of the complete trials of two arms that count as treated alike, at any ratio.

Which trials belong to the best half of a rung depends on the order of the trials. On stored learning curves, two arms
of 8 to 16 trials under the default rule differ by three or more in 0 to 1 % of the pairs, by two in 4 to 14 %."""
MAX_TRIALS_PER_DIMENSION_RATIO = 2.0
"""Maximum ratio of the trials per searched dimension of two arms that count as treated alike. It is used if an expected
regret is missing."""

MEASURES: dict[str, tuple[str, Callable[[Any], str], Callable[[float, float], bool]]] = {
    "trials_asked": ("trials", str, lambda low, high: low < high),
    "trials_complete": (
        "complete trials",
        str,
        lambda low, high: (
            low == 0 < high or (high - low > MAX_COMPLETE_TRIALS_DIFFERENCE and high > MAX_EFFORT_RATIO * low)
        ),
    ),
    "tokens_trained": ("tokens", format_count, lambda low, high: high > MAX_EFFORT_RATIO * low),
    "lr_decades": (
        "decades of learning rates",
        "{:.1f}".format,
        lambda low, high: high - low > MAX_WIDTH_DIFFERENCE_DECADES,
    ),
    "dimensions": ("searched dimensions", str, lambda low, high: False),
}
"""For each measure: its unit, how to format it, and whether a lowest and a highest value differ too much."""


def judge_fairness(data: SweepData) -> tuple[list[str], dict[str, Any]]:
    """Returns whether arms had equal trials, similar tokens and ranges, and an expected regret below the margin.

    Returns:
        The judgement in sentences; none if fewer than two arms train. Then `is_fair`, which is None in that case, and
        `arms`, the effort of each arm that trains as `measure_effort` returns it.
    """
    efforts = {arm.name: measure_effort(arm, data) for arm in data.searches if arm.row.method != "frozen"}
    arms = [{"arm": name, **effort} for name, effort in efforts.items()]
    if len(efforts) < 2:
        return [], {"is_fair": None, "arms": arms}
    faults, ranges = [], []
    for measure, (unit, form, differs_too_much) in MEASURES.items():
        values = {name: effort[measure] for name, effort in efforts.items()}
        least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        low, high = form(values[least]), form(values[most])
        ranges.append(_count(low, unit) if low == high else f"{low} to {high} {unit}")
        if differs_too_much(values[least], values[most]):
            faults.append(f"`{least}` had {_count(low, unit)} and `{most}` {high}")
    faults += _judge_search(efforts, data)
    so_far = "" if data.record.status == "complete" else "so far "
    judgement = f"not fair: {'; '.join(faults)}" if faults else "fair"
    sentences = [
        f"The comparison of arms is {so_far}{judgement}.",
        f"Each of the {len(arms)} arms that train had {join_words(ranges)}.",
        *_describe_regrets(efforts, data),
    ]
    return sentences, {"is_fair": not faults, "arms": arms}


def measure_effort(arm: ArmData, data: SweepData) -> dict[str, Any]:
    """Returns the trials and tokens that the search spent on an arm, and its expected regret.

    `tokens_trained` counts all trials, complete or not. `lr_decades` is the width of the range of learning rates, 0 if
    it is not searched. `dimensions` is the number of searched keys; under the rate law, learning rate and α count as
    one key. `regret` is how much better an untried setting is expected to be, in the metric's unit: the largest of the
    arm's subjects, None if it is not known. `regret_margins` is the same as a multiple of the margin.
    """
    keys = set(arm.row.space)
    if LR in keys and any(trial.follows_rate_law for trial in arm.trials):
        keys -= {ALPHA, ALPHA_OVER_RANK}
    settings = [one.setting for one in data.arms if one.arm == arm.name and one.setting]
    regret = max((one.regret for one in settings if one.regret is not None), default=None)
    margin = data.evidence.margin
    return {
        "trials_asked": arm.row.trials,
        "trials_complete": arm.count("complete"),
        "tokens_trained": sum(trial.record.tokens_trained for trial in arm.trials if trial.record),
        "lr_decades": width_in_decades(arm.row.space.get(LR)) or 0.0,
        "dimensions": len(keys),
        "regret": regret,
        "regret_margins": None if regret is None or not margin else regret / margin,
    }


def _judge_search(efforts: Mapping[str, dict[str, Any]], data: SweepData) -> list[str]:
    """Returns a clause if an untried setting could decide the comparison.

    That is an expected regret of more than one margin. If it is not known, the trials of each dimension count.
    """
    margin = data.evidence.margin
    regrets = {row.subject: row.regret / margin for row in data.record.settings if margin and row.regret is not None}
    lucky = [f"{regret:.2g} margins for `{subject}`" for subject, regret in regrets.items() if regret > 1]
    if lucky:
        return [f"an untried setting is expected to be better by {join_words(lucky)}, so luck of the search may decide"]
    density = {name: one["trials_asked"] / one["dimensions"] for name, one in efforts.items() if one["dimensions"]}
    if len(density) < 2 or all(one["regret_margins"] is not None for one in efforts.values()):
        return []
    least, most = min(density, key=density.__getitem__), max(density, key=density.__getitem__)
    if density[most] <= MAX_TRIALS_PER_DIMENSION_RATIO * density[least]:
        return []
    return [f"`{least}` had {density[least]:.2g} trials for each searched dimension and `{most}` {density[most]:.2g}"]


def _describe_regrets(efforts: Mapping[str, dict[str, Any]], data: SweepData) -> list[str]:
    """Returns a sentence on the expected regrets, as shares of full's gain or in margins; an empty list if unknown."""
    gain = data.evidence.gain or data.full_gain
    known = []
    for name, effort in efforts.items():
        if effort["regret"] is not None and gain is not None:
            known.append(f"{format_share(effort['regret'] / gain)} of full's gain for `{name}`")
        elif effort["regret_margins"] is not None:
            known.append(f"{effort['regret_margins']:.2g} margins for `{name}`")
    if not known:
        return []
    return [f"By the search's model, an untried setting is expected to gain more by {join_words(known)}."]


def _count(number: str, unit: str) -> str:
    return f"{number} {unit.removesuffix('s') if number == '1' else unit}"
