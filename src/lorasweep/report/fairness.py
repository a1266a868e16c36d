"""Whether a sweep treated its arms alike, judged by what ran. Comes after `tables`, before `headline`.

`sweep.fairness` warns of what was planned, before the first trial. This counts what became of it: completed trials and
training tokens of the search. Reruns of the confirm stage are left out: they choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lorasweep.config.ranges import MAX_WIDTH_DIFFERENCE_DECADES, width_in_decades
from lorasweep.report.confirmed import MAX_ARMS
from lorasweep.report.tables import Arm, SweepData
from lorasweep.wording import format_count, format_ratio, short_key

MAX_RATIO = 1.25
"""Arms count as alike if none has more than this times another's tokens or complete trials."""
MAX_COMPLETE_DIFFERENCE = 2
"""Arms count as alike in complete trials, whatever the ratio, if none has more than this many more than another. Who
belongs to the better half of a rung depends on the order of the trials: on stored learning curves, two arms of 8 to 16
trials under the default rule differ by three or more in 0 to 1 % of the pairs, by two in 4 to 14 %."""
LR = "optim.lr"


@dataclass(frozen=True, kw_only=True)
class ArmEffort:
    """What the search spent on one arm."""

    arm: str
    trials_asked: int
    trials_complete: int
    trials_stopped_early: int
    """Pruned or paused."""
    tokens_trained: int
    """Training tokens of all the arm's trials, complete or not."""
    widths_decades: dict[str, float | None]
    """Per swept key log10(highest / lowest value); null where the values are not positive numbers."""


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """How alike the arms that train were treated."""

    is_fair: bool | None
    """Null where fewer than two arms train, so that there is nothing to compare."""
    sentences: tuple[str, ...]
    """The judgement and the numbers behind it; none where there is nothing to compare."""
    arms: tuple[ArmEffort, ...]


def judge_fairness(data: SweepData) -> Fairness:
    """Returns whether the arms had equal trials, like tokens, like learning-rate ranges and like complete trials."""
    arms = tuple(_measure(arm) for arm in data.arms if arm.row.method != "frozen")
    if len(arms) < 2:
        return Fairness(is_fair=None, sentences=(), arms=arms)
    faults = [*_find_faults(arms)]
    so_far = "" if data.record.status == "complete" else "so far "
    judgement = (
        f"The comparison of arms is {so_far}not fair: {'; '.join(faults)}."
        if faults
        else f"The comparison of arms is {so_far}fair: they had equal numbers of trials, and about as many complete "
        "trials, as many tokens and as wide a range of learning rates."
    )
    numbers = (
        f"Each of {len(arms)} arms: {_describe(arms)}."
        if len(arms) > MAX_ARMS
        else f"{'; '.join(f'`{arm.arm}`: {_describe([arm])}' for arm in arms)}."
    )
    return Fairness(is_fair=not faults, sentences=(judgement, numbers), arms=arms)


def _measure(arm: Arm) -> ArmEffort:
    return ArmEffort(
        arm=arm.name,
        trials_asked=arm.row.trials,
        trials_complete=arm.count("complete"),
        trials_stopped_early=sum(trial.is_stopped_early for trial in arm.trials),
        tokens_trained=sum(trial.record.tokens_trained for trial in arm.trials if trial.record),
        widths_decades={key: width_in_decades(searched) for key, searched in arm.row.space.items()},
    )


def _find_faults(arms: Sequence[ArmEffort]) -> Iterable[str]:
    """Yields what differs too much, each with the two arms that are farthest apart."""
    least, most = _ends(arms, lambda arm: arm.trials_asked)
    if least.trials_asked < most.trials_asked:
        yield f"`{most.arm}` was given {most.trials_asked} trials and `{least.arm}` {least.trials_asked}"
    least, most = _ends(arms, lambda arm: arm.trials_complete)
    low, high = least.trials_complete, most.trials_complete
    if low == 0 or (high - low > MAX_COMPLETE_DIFFERENCE and high > MAX_RATIO * low):
        yield f"`{least.arm}` has {low or 'no'} complete trial{'' if low <= 1 else 's'} and `{most.arm}` {high}"
    least, most = _ends(arms, lambda arm: arm.tokens_trained)
    low, high = least.tokens_trained, most.tokens_trained
    if high > MAX_RATIO * low:
        yield (
            f"`{most.arm}` trained on {format_ratio(high / low)} times as many tokens as `{least.arm}`"
            if low > 0
            else f"`{most.arm}` trained on tokens, `{least.arm}` on none"
        )
    least, most = _ends(arms, _lr_width)
    if _lr_width(most) - _lr_width(least) > MAX_WIDTH_DIFFERENCE_DECADES:
        narrow = f"over {_lr_width(least):.1f}" if _lr_width(least) else "not at all"
        yield (
            f"the learning rate of `{most.arm}` was searched over {_lr_width(most):.1f} decades and that of "
            f"`{least.arm}` {narrow}"
        )


def _ends(arms: Sequence[ArmEffort], measure: Callable[[ArmEffort], float]) -> tuple[ArmEffort, ArmEffort]:
    """Returns the arms with the least and the most of something."""
    return min(arms, key=measure), max(arms, key=measure)


def _lr_width(arm: ArmEffort) -> float:
    """Returns how wide the arm's learning-rate range is, in decades; 0 where it is not searched."""
    return arm.widths_decades.get(LR) or 0.0


def _describe(arms: Sequence[ArmEffort]) -> str:
    """Returns the numbers of one arm, or from the lowest to the highest of several."""
    asked = _span([arm.trials_asked for arm in arms])
    complete = _span([arm.trials_complete for arm in arms])
    stopped = _span([arm.trials_stopped_early for arm in arms])
    ended = f"{complete} complete" if stopped == "0" else f"{complete} complete, {stopped} stopped early"
    tokens = _span([arm.tokens_trained for arm in arms], format_count)
    widths = [
        f"{short_key(key)} over {_span(found, '{:.1f}'.format)}"
        for key in dict.fromkeys([LR, *(key for arm in arms for key in arm.widths_decades)])
        if (found := [width for arm in arms if (width := arm.widths_decades.get(key)) is not None])
    ]
    searched = f"{', '.join(widths)} decades" if widths else "no range of numbers searched"
    return f"{asked} trial{'' if asked == '1' else 's'} ({ended}), {tokens} tokens, {searched}"


def _span(values: Sequence[float], form: Callable[[float], str] = str) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"
