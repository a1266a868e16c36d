"""How much the best score of an arm varies from search to search (`sweep.searches`)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from statistics import fmean, stdev

from lorasweep.report.sweep_data import ArmData, SweepData


@dataclass(frozen=True, kw_only=True)
class SearchWinner:
    """The best complete trial of one search of an arm."""

    search: int
    trial: int
    score: float


@dataclass(frozen=True, kw_only=True)
class ArmSpread:
    """The winners of all searches of an arm, and mean, standard deviation and range of their validation scores."""

    arm: str
    winners: tuple[SearchWinner, ...]
    mean: float
    std: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class PairOrder:
    """How often the order of two arms was the same."""

    first: str
    """The arm with the better mean."""
    second: str
    num_searches: int
    num_same: int
    """Number of searches in which the first arm has the better score."""


@dataclass(frozen=True, kw_only=True)
class SearchSpread:
    """The spread of arms over searches."""

    arms: tuple[ArmSpread, ...]
    pairs: tuple[PairOrder, ...]
    sentence: str


def measure_search_spread(data: SweepData) -> SearchSpread | None:
    """Returns the spread of all arms with two finished searches; None if there is no such arm."""
    arms = tuple(spread for arm in data.arms if (spread := _measure_arm(arm, data)))
    if not arms:
        return None
    pairs = tuple(order for pair in itertools.combinations(arms, 2) if (order := _compare_orders(*pair, data.sign)))
    return SearchSpread(arms=arms, pairs=pairs, sentence=_describe(arms, pairs))


def _measure_arm(arm: ArmData, data: SweepData) -> ArmSpread | None:
    num_searches = 1 + len(data.record.search_seeds)
    winners = []
    for search in range(1, num_searches + 1):
        trials = [trial for trial in arm.trials if trial.search == search]
        is_over = all(trial.state not in ("running", "paused") for trial in trials)
        scores = [(data.sign * t.value, t.number, t.value) for t in trials if t.is_complete and t.value is not None]
        if scores and is_over and len(trials) == arm.row.trials / num_searches:
            _, number, score = min(scores)
            winners.append(SearchWinner(search=search, trial=number, score=score))
    if len(winners) < 2:
        return None
    found = [winner.score for winner in winners]
    return ArmSpread(
        arm=arm.name,
        winners=tuple(winners),
        mean=fmean(found),
        std=stdev(found),
        lowest=min(found),
        highest=max(found),
    )


def _compare_orders(one: ArmSpread, other: ArmSpread, sign: int) -> PairOrder | None:
    """Returns the order over the searches that both arms have finished."""
    others = {winner.search: winner.score for winner in other.winners}
    # positive where `one` is better
    gaps = [sign * (others[winner.search] - winner.score) for winner in one.winners if winner.search in others]
    if not gaps:
        return None
    first, second = (one, other) if fmean(gaps) >= 0 else (other, one)
    num_same = sum(gap > 0 if first is one else gap < 0 for gap in gaps)
    return PairOrder(first=first.arm, second=second.arm, num_searches=len(gaps), num_same=num_same)


def _describe(arms: tuple[ArmSpread, ...], pairs: tuple[PairOrder, ...]) -> str:
    ordered = sorted(arms, key=lambda arm: arm.std)
    named = [f"{arm.std:.2g} (`{arm.arm}`)" for arm in (ordered[0], ordered[-1])]
    sentence = (
        f"Over {max(len(arm.winners) for arm in arms)} searches with different seeds, the best validation score of an "
        f"arm has a standard deviation of {' to '.join(dict.fromkeys(named))}"
    )
    if len(pairs) == 1:
        (pair,) = pairs
        return f"{sentence}; `{pair.first}` is better than `{pair.second}` in {pair.num_same} of {pair.num_searches}."
    if pairs:
        num_same = sum(pair.num_same == pair.num_searches for pair in pairs)
        return f"{sentence}; {num_same} of {len(pairs)} pairs of arms have the same order in every search."
    return f"{sentence}."
