"""Whether a sweep treated its arms alike, and whether the search found each arm's best setting.

`sweep.definition.warnings` warns about the plan before the first trial. This module judges the result. Confirm runs
don't count: they choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.config.ranges import MAX_WIDTH_DIFFERENCE_DECADES, width_in_decades
from lorasweep.report.answers import follows_rate_law
from lorasweep.report.sweep_data import ALPHA, LR, MULTIPLIER, ArmData, SweepData
from lorasweep.wording import format_count, format_share, join_words

MAX_RATIO = 1.25
"""Arms are treated alike if none has more than this times another's tokens or complete trials."""
MAX_COMPLETE_DIFFERENCE = 2
"""Arms are treated alike if none has more than this many more complete trials than another, at any ratio.

Which trials belong to the best half of a rung depends on the order of the trials. On stored learning curves, two arms
of 8 to 16 trials under the default rule differ by three or more in 0 to 1 % of the pairs, by two in 4 to 14 %."""

MAX_DENSITY_RATIO = 2.0
"""Without an expected regret, arms are treated alike if none has more than this times another's trials for each
searched dimension."""


@dataclass(frozen=True, kw_only=True)
class ArmEffort:
    """The trials and tokens that the search spent on one arm, and what it left open."""

    arm: str
    trials_asked: int
    trials_complete: int
    tokens_trained: int
    """The training tokens of all the arm's trials, complete or not."""
    lr_decades: float
    """log10(highest / lowest learning rate of the range); 0 if it is not searched."""
    dimensions: int
    """The number of searched keys. Learning rate and α of LoRA count as one, because the rate law joins them."""
    regret: float | None
    """How much better an untried setting is expected to be, in the metric's unit: the largest of the arm's subjects.
    Null before the confirm stage, or if the search has no model of it."""
    regret_margins: float | None
    """The same as a multiple of the margin; null without a margin."""


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
    ("dimensions", "searched dimensions", str, lambda low, high: False),
)
"""The field of `ArmEffort`, its unit, how to format it, and whether a lowest and a highest value differ too much."""


def judge_fairness(data: SweepData) -> Fairness:
    """Returns whether arms had equal trials, similar tokens and ranges, and an expected regret below the margin."""
    arms = tuple(_measure(arm, data) for arm in data.searches if arm.row.method != "frozen")
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
    faults += _judge_search(arms, data)
    so_far = "" if data.record.status == "complete" else "so far "
    judgement = f"not fair: {'; '.join(faults)}" if faults else "fair"
    sentences = (
        f"The comparison of arms is {so_far}{judgement}.",
        f"Each of the {len(arms)} arms that train had {join_words(ranges)}.",
        *_describe_regrets(arms, data),
    )
    return Fairness(is_fair=not faults, sentences=sentences, arms=arms)


def _judge_search(arms: Sequence[ArmEffort], data: SweepData) -> list[str]:
    """Returns a clause if an untried setting could decide the comparison.

    That is an expected regret of more than one margin. If it is not known, the trials of each dimension count.
    """
    margin = data.evidence.margin
    regrets = {row.subject: row.regret / margin for row in data.record.settings if margin and row.regret is not None}
    lucky = [f"{regret:.2g} margins for `{subject}`" for subject, regret in regrets.items() if regret > 1]
    if lucky:
        return [f"an untried setting is expected to be better by {join_words(lucky)}, so luck of the search may decide"]
    density = {arm.arm: arm.trials_asked / arm.dimensions for arm in arms if arm.dimensions}
    if len(density) < 2 or all(arm.regret_margins is not None for arm in arms):
        return []
    least, most = min(density, key=density.__getitem__), max(density, key=density.__getitem__)
    if density[most] <= MAX_DENSITY_RATIO * density[least]:
        return []
    return [f"`{least}` had {density[least]:.2g} trials for each searched dimension and `{most}` {density[most]:.2g}"]


def _describe_regrets(arms: Sequence[ArmEffort], data: SweepData) -> list[str]:
    """Returns a sentence on the expected regrets as shares of full's gain, or in margins; empty if none is known."""
    gain = data.evidence.gain or data.full_gain
    known = []
    for arm in arms:
        if arm.regret is not None and gain is not None:
            known.append(f"{format_share(arm.regret / gain)} of full's gain for `{arm.arm}`")
        elif arm.regret_margins is not None:
            known.append(f"{arm.regret_margins:.2g} margins for `{arm.arm}`")
    return (
        [f"By the search's model, an untried setting is expected to gain more by {join_words(known)}."] if known else []
    )


def _count(number: str, unit: str) -> str:
    return f"{number} {unit.removesuffix('s') if number == '1' else unit}"


def _measure(arm: ArmData, data: SweepData) -> ArmEffort:
    keys = set(arm.row.space)
    if LR in keys and any(follows_rate_law(trial) for trial in arm.trials):
        keys -= {ALPHA, MULTIPLIER}
    settings = [one.setting for one in data.arms if one.arm == arm.name and one.setting]
    regret = max((one.regret for one in settings if one.regret is not None), default=None)
    margin = data.evidence.margin
    return ArmEffort(
        arm=arm.name,
        trials_asked=arm.row.trials,
        trials_complete=arm.count("complete"),
        tokens_trained=sum(trial.record.tokens_trained for trial in arm.trials if trial.record),
        lr_decades=width_in_decades(arm.row.space.get(LR)) or 0.0,
        dimensions=len(keys),
        regret=regret,
        regret_margins=None if regret is None or not margin else regret / margin,
    )
