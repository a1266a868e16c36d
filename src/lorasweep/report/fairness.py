"""Whether a sweep treated its arms alike, judged by the trials and tokens that the search spent on them.

`sweep.definition.warnings` warns about the plan before the first trial. This module judges the result. Confirm runs
don't count: they choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorasweep.config.ranges import MAX_WIDTH_DIFFERENCE_DECADES, width_in_decades
from lorasweep.report.sweep_data import LR, ArmData, SweepData
from lorasweep.wording import format_count, join_words

MAX_RATIO = 1.25
"""Arms are treated alike if none has more than this times another's tokens or complete trials."""
MAX_COMPLETE_DIFFERENCE = 2
"""Arms are treated alike if none has more than this many more complete trials than another, at any ratio.

Which trials belong to the best half of a rung depends on the order of the trials. On stored learning curves, two arms
of 8 to 16 trials under the default rule differ by three or more in 0 to 1 % of the pairs, by two in 4 to 14 %."""


@dataclass(frozen=True, kw_only=True)
class ArmEffort:
    """The trials and tokens that the search spent on one arm."""

    arm: str
    trials_asked: int
    trials_complete: int
    tokens_trained: int
    """The training tokens of all the arm's trials, complete or not."""
    lr_decades: float
    """log10(highest / lowest learning rate of the range); 0 if it is not searched."""


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """Whether the arms that train were treated alike."""

    is_fair: bool | None
    """Null if fewer than two arms train."""
    sentences: tuple[str, ...]
    """The judgement and its numbers; empty if fewer than two arms train."""
    arms: tuple[ArmEffort, ...]


MEASURES: tuple[tuple[str, str, Callable[[Any], str], Callable[[float, float], bool]], ...] = (
    ("trials_asked", "trials", str, lambda low, high: low < high),
    (
        "trials_complete",
        "complete trials",
        str,
        lambda low, high: low == 0 < high or (high - low > MAX_COMPLETE_DIFFERENCE and high > MAX_RATIO * low),
    ),
    ("tokens_trained", "tokens", format_count, lambda low, high: high > MAX_RATIO * low),
    (
        "lr_decades",
        "decades of learning rates",
        "{:.1f}".format,
        lambda low, high: high - low > MAX_WIDTH_DIFFERENCE_DECADES,
    ),
)
"""The field of `ArmEffort`, its unit, how to format it, and whether a lowest and a highest value differ too much."""


def judge_fairness(data: SweepData) -> Fairness:
    """Returns whether arms had equal trials, and similar tokens, complete trials and widths of learning-rate ranges."""
    arms = tuple(_measure(arm) for arm in data.arms if arm.row.method != "frozen")
    if len(arms) < 2:
        return Fairness(is_fair=None, sentences=(), arms=arms)
    faults, ranges = [], []
    for field, unit, form, differs_too_much in MEASURES:
        values = {arm.arm: getattr(arm, field) for arm in arms}
        least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        low, high = form(values[least]), form(values[most])
        ranges.append(_count(low, unit) if low == high else f"{low} to {high} {unit}")
        if differs_too_much(values[least], values[most]):
            faults.append(f"`{least}` had {_count(low, unit)} and `{most}` {high}")
    so_far = "" if data.record.status == "complete" else "so far "
    judgement = f"not fair: {'; '.join(faults)}" if faults else "fair"
    sentences = (
        f"The comparison of arms is {so_far}{judgement}.",
        f"Each of the {len(arms)} arms that train had {join_words(ranges)}.",
    )
    return Fairness(is_fair=not faults, sentences=sentences, arms=arms)


def _count(number: str, unit: str) -> str:
    return f"{number} {unit.removesuffix('s') if number == '1' else unit}"


def _measure(arm: ArmData) -> ArmEffort:
    return ArmEffort(
        arm=arm.name,
        trials_asked=arm.row.trials,
        trials_complete=arm.count("complete"),
        tokens_trained=sum(trial.record.tokens_trained for trial in arm.trials if trial.record),
        lr_decades=width_in_decades(arm.row.space.get(LR)) or 0.0,
    )
