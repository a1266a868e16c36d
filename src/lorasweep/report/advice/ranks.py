"""The smallest rank that is not distinguishably worse than the best one."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.report.advice.noise import RANK, near_best, rank_groups, rank_of, tolerance_of
from lorasweep.report.evidence import Evidence, Pair
from lorasweep.report.tables import Arm, SweepData
from lorasweep.wording import format_difference, format_estimate, format_setting, format_share


@dataclass(frozen=True, kw_only=True)
class RankAdvice:
    """Which rank is enough among arms, or trials of an arm, that differ in rank."""

    rank: float
    """The smallest that is not distinguishably worse than the best."""
    best_rank: float
    """The rank with the best score."""
    arms: tuple[str, ...]
    """The arm of `rank` and the arm of `best_rank`; one arm where the rank was swept inside it."""
    is_confirmed: bool
    """Whether that is from the confirm stage; else from one seed each on validation data."""
    difference: float | None
    """How much worse `rank` scored, in the metric's unit, >= 0."""
    interval: tuple[float, float] | None
    """Its 95 % interval."""
    smallest_visible: float | None
    """The smallest difference that could have been seen."""
    sentence: str


def advise_rank(data: SweepData) -> list[RankAdvice]:
    """Returns the smallest sufficient rank of each group of arms that differ in rank alone; else from the search."""
    lora = [arm for arm in data.arms if arm.row.method not in ("frozen", "full")]
    confirmed = [advice for group in rank_groups(lora) if (advice := _from_confirm(group, data))]
    searched = [advice for arm in lora if RANK in arm.row.space and (advice := _from_search(arm, data))]
    return [*confirmed, *searched]


def _from_confirm(group: list[Arm], data: SweepData) -> RankAdvice | None:
    evidence = data.evidence
    known = [arm for arm in group if (found := evidence.arm(arm.name)) and len(found.seeds) > 1]
    if len(known) < 2:
        return None
    best = min(known, key=lambda arm: data.sign * _mean(arm, evidence))
    for arm in known:
        pair = evidence.pair(arm.name, best.name)
        if arm is best:
            return _advice(arm, best, None, known, data)
        if pair and pair.verdict == "not distinguishable":
            return _advice(arm, best, pair, known, data)
    return None


def _mean(arm: Arm, evidence: Evidence) -> float:
    found = evidence.arm(arm.name)
    return found.mean if found else float("inf")


def _advice(arm: Arm, best: Arm, pair: Pair | None, group: list[Arm], data: SweepData) -> RankAdvice:
    rank, best_rank = rank_of(arm) or 0.0, rank_of(best) or 0.0
    difference, interval = _worse_by(arm, pair, data)
    return RankAdvice(
        rank=rank,
        best_rank=best_rank,
        arms=(arm.name, best.name),
        is_confirmed=True,
        difference=difference,
        interval=interval,
        smallest_visible=pair.smallest_visible if pair else None,
        sentence=_sentence(rank, best_rank, pair, (difference, interval), group, data),
    )


def _worse_by(arm: Arm, pair: Pair | None, data: SweepData) -> tuple[float | None, tuple[float, float] | None]:
    """Returns a pair's difference and interval with the sign of how much worse the arm is."""
    if pair is None or pair.difference is None:
        return None, None
    seen = pair.seen_from(arm.name)
    ends = sorted(data.sign * end for end in seen.interval) if seen.interval else None
    return data.sign * (seen.difference or 0.0), (ends[0], ends[1]) if ends else None


def _sentence(
    rank: float,
    best_rank: float,
    pair: Pair | None,
    worse: tuple[float | None, tuple[float, float] | None],
    group: list[Arm],
    data: SweepData,
) -> str:
    ranks = [rank_of(arm) or 0.0 for arm in group]
    if pair is None and rank == min(ranks):
        return f"Rank {format_setting(rank)} is the lowest that was confirmed and has the best score."
    if pair is None:
        return (
            f"Rank {format_setting(best_rank)} has the best score, and every lower rank is distinguishably worse: "
            f"{'search higher ranks too' if best_rank == max(ranks) else 'it is needed here'}."
        )
    difference, interval = worse
    at_most = interval[1] if interval else None
    share = _share_of_gain(at_most, data)
    kept = f", at most {format_share(share)} of full fine-tuning's gain" if share is not None else ""
    return (
        f"Rank {format_setting(rank)} is the smallest whose score is not distinguishably worse than the best, "
        f"rank {format_setting(best_rank)}: it is worse by {format_estimate(difference, interval)}{kept}. "
        f"The smallest difference that could have been seen is {format_difference(pair.smallest_visible)}."
    )


def _share_of_gain(difference: float | None, data: SweepData) -> float | None:
    evidence = data.evidence
    base, full = evidence.arm(evidence.base or ""), evidence.arm(evidence.full or "")
    gain = data.sign * (base.mean - full.mean) if base and full else 0.0
    return difference / gain if difference is not None and difference > 0 and gain > 0 else None


def _from_search(arm: Arm, data: SweepData) -> RankAdvice | None:
    tolerance = tolerance_of(arm, data)
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
        difference=None,
        interval=None,
        smallest_visible=None,
        sentence=(
            f"In the search of `{arm.name}` rank {format_setting(best_rank)} was best, and {smaller} "
            "(one seed each, validation data). "
            "`expand: {method.rank: [...]}` gives each rank its own search and reruns."
        ),
    )
