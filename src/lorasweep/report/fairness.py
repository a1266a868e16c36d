"""Whether a sweep treated its arms alike, judged by the trials and tokens that the search spent on them.

`sweep.definition.fairness` warns about the plan before the first trial. This module judges the result. The reruns of
the confirm stage don't count: they choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorasweep.config.ranges import MAX_WIDTH_DIFFERENCE_DECADES, width_in_decades
from lorasweep.report.sweep_data import LR, ArmData, SweepData
from lorasweep.wording import format_count, format_ratio, short_key

MAX_RATIO = 1.25
"""Arms are treated alike if none has more than this times another's tokens or complete trials."""
MAX_COMPLETE_DIFFERENCE = 2
"""Arms are treated alike if none has more than this many more complete trials than another, whatever the ratio.

Which trials belong to the better half of a rung depends on the order of the trials. On stored learning curves, two arms
of 8 to 16 trials under the default rule differ by three or more in 0 to 1 % of the pairs, by two in 4 to 14 %."""
MAX_NAMED_ARMS = 4
"""If there are more arms than this, sentences name the most important ones only."""


@dataclass(frozen=True, kw_only=True)
class ArmEffort:
    """The trials and tokens that the search spent on one arm."""

    arm: str
    trials_asked: int
    trials_complete: int
    trials_stopped_early: int
    """The number of pruned and paused trials."""
    tokens_trained: int
    """The training tokens of all the arm's trials, complete or not."""
    widths_decades: dict[str, float | None]
    """Per swept key log10(highest / lowest value); null if the values are not positive numbers."""

    @property
    def lr_width(self) -> float:
        """The width of the learning-rate range in decades; 0 if it is not searched."""
        return self.widths_decades.get(LR) or 0.0


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """Whether the arms that train were treated alike."""

    is_fair: bool | None
    """Null if fewer than two arms train."""
    sentences: tuple[str, ...]
    """The judgement and its numbers; empty if fewer than two arms train."""
    arms: tuple[ArmEffort, ...]


def judge_fairness(data: SweepData) -> Fairness:
    """Returns whether arms had equal trials, and similar tokens, complete trials and widths of learning-rate ranges."""
    arms = tuple(_measure(arm) for arm in data.arms if arm.row.method != "frozen")
    if len(arms) < 2:
        return Fairness(is_fair=None, sentences=(), arms=arms)
    faults = _find_faults(arms)
    so_far = "" if data.record.status == "complete" else "so far "
    judgement = (
        f"The comparison of arms is {so_far}not fair: {'; '.join(faults)}."
        if faults
        else f"The comparison of arms is {so_far}fair: they had equal numbers of trials, and about as many complete "
        "trials, as many tokens and as wide a range of learning rates."
    )
    numbers = (
        f"Each of {len(arms)} arms: {_describe(arms)}."
        if len(arms) > MAX_NAMED_ARMS
        else f"{'; '.join(f'`{arm.arm}`: {_describe([arm])}' for arm in arms)}."
    )
    return Fairness(is_fair=not faults, sentences=(judgement, numbers), arms=arms)


def _measure(arm: ArmData) -> ArmEffort:
    return ArmEffort(
        arm=arm.name,
        trials_asked=arm.row.trials,
        trials_complete=arm.count("complete"),
        trials_stopped_early=sum(trial.is_stopped_early for trial in arm.trials),
        tokens_trained=sum(trial.record.tokens_trained for trial in arm.trials if trial.record),
        widths_decades={key: width_in_decades(searched) for key, searched in arm.row.space.items()},
    )


def _find_faults(arms: Sequence[ArmEffort]) -> list[str]:
    """Returns each difference that is too large, with the two arms that differ most."""

    def find_ends(measure: Callable[[ArmEffort], float]) -> tuple[ArmEffort, ArmEffort]:
        return min(arms, key=measure), max(arms, key=measure)

    faults = []
    least, most = find_ends(lambda arm: arm.trials_asked)
    if least.trials_asked < most.trials_asked:
        faults.append(f"`{most.arm}` was given {most.trials_asked} trials and `{least.arm}` {least.trials_asked}")
    least, most = find_ends(lambda arm: arm.trials_complete)
    low, high = least.trials_complete, most.trials_complete
    if low == 0 or (high - low > MAX_COMPLETE_DIFFERENCE and high > MAX_RATIO * low):
        faults.append(
            f"`{least.arm}` has {low or 'no'} complete trial{'' if low <= 1 else 's'} and `{most.arm}` {high}"
        )
    least, most = find_ends(lambda arm: arm.tokens_trained)
    low, high = least.tokens_trained, most.tokens_trained
    if high > MAX_RATIO * low:
        faults.append(
            f"`{most.arm}` trained on {format_ratio(high / low)} times as many tokens as `{least.arm}`"
            if low > 0
            else f"`{most.arm}` trained on tokens, `{least.arm}` on none"
        )
    least, most = find_ends(lambda arm: arm.lr_width)
    if most.lr_width - least.lr_width > MAX_WIDTH_DIFFERENCE_DECADES:
        narrow = f"over {least.lr_width:.1f}" if least.lr_width else "not at all"
        faults.append(
            f"the learning rate of `{most.arm}` was searched over {most.lr_width:.1f} decades and that of "
            f"`{least.arm}` {narrow}"
        )
    return faults


def _describe(arms: Sequence[ArmEffort]) -> str:
    """Returns the numbers of one arm, or the lowest and the highest number of several."""
    asked = _format_range([arm.trials_asked for arm in arms])
    complete = _format_range([arm.trials_complete for arm in arms])
    stopped = _format_range([arm.trials_stopped_early for arm in arms])
    ended = f"{complete} complete" if stopped == "0" else f"{complete} complete, {stopped} stopped early"
    tokens = _format_range([arm.tokens_trained for arm in arms], format_count)
    widths = [
        f"{short_key(key)} over {_format_range(found, '{:.1f}'.format)}"
        for key in dict.fromkeys([LR, *(key for arm in arms for key in arm.widths_decades)])
        if (found := [width for arm in arms if (width := arm.widths_decades.get(key)) is not None])
    ]
    searched = f"{', '.join(widths)} decades" if widths else "no range of numbers searched"
    return f"{asked} trial{'' if asked == '1' else 's'} ({ended}), {tokens} tokens, {searched}"


def _format_range(values: Sequence[float], form: Callable[[float], str] = str) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"
