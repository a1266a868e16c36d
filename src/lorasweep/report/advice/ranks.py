"""The smallest rank that is not distinguishably worse than the best one."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.report.advice.tolerance import find_tolerance, near_best
from lorasweep.report.evidence import PairComparison
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.sweep_data import RANK, ArmData, SweepData, group_by_rank
from lorasweep.wording import format_difference, format_estimate, format_setting, format_share


@dataclass(frozen=True, kw_only=True)
class RankAdvice:
    """The sufficient rank among arms, or among the trials of one arm, that differ in rank."""

    rank: float
    """The smallest rank that is not distinguishably worse than the best."""
    best_rank: float
    """The rank with the best score."""
    arms: tuple[str, ...]
    """The arm of `rank` and the arm of `best_rank`; one arm if the rank was swept inside it."""
    is_confirmed: bool
    """Whether the confirm stage decided; else it was one seed per trial on validation data."""
    difference: float | None = None
    """How much worse `rank` scored, in the metric's unit; negative if it scored better."""
    interval: Interval | None = None
    """The 95 % interval of `difference`."""
    minimum_detectable: float | None = None
    """The minimum detectable difference between the two arms."""
    sentence: str


def advise_ranks(data: SweepData) -> list[RankAdvice]:
    """Returns advice on each group of confirmed arms that differ in rank alone and on each arm that sweeps the rank."""
    trained = [arm for arm in data.arms if arm.row.method not in ("frozen", "full")]
    confirmed = [advice for group in group_by_rank(trained) if (advice := _advise_from_confirm(group, data))]
    searched = [advice for arm in trained if RANK in arm.row.space and (advice := _advise_from_search(arm, data))]
    return [*confirmed, *searched]


def _advise_from_confirm(group: list[ArmData], data: SweepData) -> RankAdvice | None:
    means = {arm.name: found.mean for arm in group if (found := data.evidence.arm(arm.name)) and len(found.seeds) > 1}
    known = [arm for arm in group if arm.name in means]
    if len(known) < 2:
        return None
    best = min(known, key=lambda arm: data.sign * means[arm.name])
    # The group is by rising rank, so the first arm that is not worse has the smallest sufficient rank.
    for arm in known:
        pair = data.evidence.pair(arm.name, best.name)
        if arm is best or (pair and pair.verdict == "not distinguishable"):
            return _build_advice(arm, best, pair, known, data)
    return None


def _build_advice(
    arm: ArmData, best: ArmData, pair: PairComparison | None, group: list[ArmData], data: SweepData
) -> RankAdvice:
    rank, best_rank = arm.rank or 0.0, best.rank or 0.0
    difference = interval = None
    if pair and pair.difference is not None:  # with the sign of how much worse the arm is
        difference = data.sign * pair.difference
        low, high = sorted(data.sign * end for end in pair.interval) if pair.interval else (None, None)
        interval = (low, high) if low is not None and high is not None else None
    if pair:
        at_most = _share_of_gain(interval[1], data) if interval else None
        share = f", at most {format_share(at_most)} of full fine-tuning's gain" if at_most is not None else ""
        sentence = (
            f"Rank {format_setting(rank)} is the smallest whose score is not distinguishably worse than the best, "
            f"rank {format_setting(best_rank)}: it is worse by {format_estimate(difference, interval)}{share}. "
            f"The minimum detectable difference is {format_difference(pair.minimum_detectable)}."
        )
    elif arm is group[0]:
        sentence = f"Rank {format_setting(rank)} is the lowest that was confirmed and has the best score."
    else:
        consequence = "search higher ranks too" if arm.rank == group[-1].rank else "this rank is needed here"
        sentence = (
            f"Rank {format_setting(rank)} has the best score, and every lower rank is distinguishably worse: "
            f"{consequence}."
        )
    return RankAdvice(
        rank=rank,
        best_rank=best_rank,
        arms=(arm.name, best.name),
        is_confirmed=True,
        difference=difference,
        interval=interval,
        minimum_detectable=pair.minimum_detectable if pair else None,
        sentence=sentence,
    )


def _share_of_gain(difference: float, data: SweepData) -> float | None:
    base, full = data.evidence.arm(data.evidence.base), data.evidence.arm(data.evidence.full)
    gain = data.sign * (base.mean - full.mean) if base and full else 0.0
    return difference / gain if difference > 0 and gain > 0 else None


def _advise_from_search(arm: ArmData, data: SweepData) -> RankAdvice | None:
    tolerance = find_tolerance(arm, data)
    best_rank = arm.best.number_at(RANK) if arm.best else None
    if tolerance is None or best_rank is None:
        return None
    rank = min(found for t in near_best(arm, data, tolerance) if (found := t.number_at(RANK)) is not None)
    smaller = (
        f"the smallest with a trial within {tolerance.source} of the best is rank {format_setting(rank)}"
        if rank < best_rank
        else f"no smaller one came within {tolerance.source} of it"
    )
    return RankAdvice(
        rank=rank,
        best_rank=best_rank,
        arms=(arm.name,),
        is_confirmed=False,
        sentence=(
            f"In the search of `{arm.name}` rank {format_setting(best_rank)} was best, and {smaller} "
            "(one seed each, validation data). "
            "`expand: {method.rank: [...]}` gives each rank its own search and reruns."
        ),
    )
