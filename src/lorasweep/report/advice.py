"""Advice from a sweep: the smallest sufficient rank or dimension, the best learning rates, where to search next."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from lorasweep.config.ranges import find_bounds
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.evidence.ranks import RankVerdict
from lorasweep.report.learning import judge_learning
from lorasweep.report.sweep_data import LR, RANK, ArmData, SweepData, TrialData
from lorasweep.wording import UNKNOWN, format_estimate, format_setting, format_share_estimate, join_words

EDGE_FRACTION = 0.05
"""A value is at an end of its range if it is closer to the end than this share of the range."""
KEPT_FRACTION = 0.9
"""The share of full fine-tuning's gain that d90 keeps."""


@dataclass(frozen=True, kw_only=True)
class RankAdvice:
    """The smallest rank that is shown to be sufficient, or the ranks that may be it."""

    rank: float | None
    """None if nothing is settled."""
    best_rank: float
    arms: tuple[str, ...]
    """The arms that the sentence is about."""
    sentence: str


@dataclass(frozen=True, kw_only=True)
class RateAdvice:
    """The learning rate of an arm's best trial."""

    arm: str
    lr: float
    is_edge: bool
    """Whether the learning rate lies at an end of its range, so that a better one may lie outside."""

    @property
    def sentence(self) -> str:
        edge = " It lies at an end of its range." if self.is_edge else ""
        return f"The best learning rate of `{self.arm}` is {format_setting(self.lr)}.{edge}"


@dataclass(frozen=True, kw_only=True)
class DimensionAdvice:
    """The intrinsic dimension of the sweep's data."""

    d90: int | None
    """The smallest dimension of `method=intrinsic` that keeps 90 % of full's gain; None if none that was tried does."""
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Advice:
    """All advice of one sweep."""

    ranks: tuple[RankAdvice, ...] = ()
    rates: tuple[RateAdvice, ...] = ()
    dimension: DimensionAdvice | None = None
    next_searches: tuple[str, ...] = ()
    """One sentence for each range that should be searched further."""
    untried: tuple[str, ...] = ()
    """One sentence for each key with values that no complete trial has."""


def advise(data: SweepData) -> Advice:
    """Returns the advice; only that on values without a complete trial if nothing was learned.

    A best value is named if complete trials have at least two values: the figures draw the same trials.
    """
    untried = tuple(describe_untried(data))
    if judge_learning(data).state == "nothing":
        return Advice(untried=untried)
    return Advice(
        ranks=tuple(_advise_rank(verdict, data) for verdict in data.evidence.ranks),
        rates=tuple(
            RateAdvice(arm=arm.name, lr=lr, is_edge=LR in find_best_edges(arm))
            for arm in data.arms
            if arm.best and len(arm.tried_settings(LR)) > 1 and (lr := arm.best.numeric_setting(LR))
        ),
        dimension=advise_dimension(data),
        next_searches=tuple(describe_edges(data)),
        untried=untried,
    )


def advise_dimension(data: SweepData) -> DimensionAdvice | None:
    """Returns the intrinsic dimension; None without complete trials of `method=intrinsic`, `frozen` and `full`.

    arXiv 1804.08838 and 2012.13255 ask for 90 % of full's *score*. Here the gain over the frozen base counts, so that
    the number means the same for every metric. Test data counts if every dimension was confirmed.
    """
    searched: dict[int, tuple[float, Interval | None]] = {}
    confirmed: dict[int, tuple[float, Interval | None]] = {}
    for arm in (arm for arm in data.arms if arm.row.method == "intrinsic"):
        for trial in arm.trials:
            dim, share = trial.numeric_setting("method.dim"), data.share_of_full_gain(trial.value)
            if trial.is_complete and dim is not None and share is not None:
                searched[int(dim)] = (max(share, searched.get(int(dim), (share, None))[0]), None)
        dim, evidence = arm.best.numeric_setting("method.dim") if arm.best else None, data.evidence.arm(arm.name)
        if dim is not None and evidence and evidence.share_of_full_gain is not None:
            confirmed[int(dim)] = (evidence.share_of_full_gain, evidence.share_interval)
    if not searched:
        return None
    is_confirmed = confirmed.keys() == searched.keys()
    shares = dict(sorted((confirmed if is_confirmed else searched).items()))
    d90 = next((dim for dim, (share, _) in shares.items() if share >= KEPT_FRACTION), None)
    best = d90 or max(shares, key=lambda dim: shares[dim][0])
    known = f"{'on test data' if is_confirmed else 'in the search'}; tried were {', '.join(map(str, shares))}"
    kept = f"{best} keeps {format_share_estimate(*shares[best])} of full fine-tuning's gain ({known})."
    if d90 is None:
        sentence = f"d90 is above {max(shares)}: the best dimension {kept}"
    else:  # a smaller dimension than the smallest that was tried may be enough too
        sentence = f"d90 {'is at most' if d90 == min(shares) else '='} {d90}: dimension {kept}"
    return DimensionAdvice(d90=d90, sentence=sentence)


def describe_untried(data: SweepData) -> list[str]:
    """Returns a sentence for each list of choices of which no complete trial has some."""
    untried: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for arm in data.arms:
        for key, values in arm.untried.items():
            untried[key, values].append(f"`{arm.name}`")
    return [
        f"Nothing is known about `{key}` {join_words(values, last='or')}: no complete trial of "
        f"{join_words(arms)} has it."
        for (key, values), arms in untried.items()
    ]


def describe_edges(data: SweepData) -> list[str]:
    """Returns a sentence for each key whose best value lies at an end of its range."""
    edges: dict[tuple[str, str], list[tuple[str, Any]]] = defaultdict(list)
    for arm in data.arms:
        for key, end in find_best_edges(arm).items():
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


def find_best_edges(arm: ArmData) -> dict[str, str]:
    """Returns the swept keys whose value in the best trial lies at an end of its range: `lower` or `upper` by key.

    A key is left out if no complete trial lies away from that end: then nothing shows that the end is better.
    """
    complete = [_find_edges(arm, trial) for trial in arm.trials if trial.is_complete]
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


def _advise_rank(verdict: RankVerdict, data: SweepData) -> RankAdvice:
    arms = (verdict.best_arm,) if verdict.arm in (None, verdict.best_arm) else (verdict.arm, verdict.best_arm)
    best = format_setting(verdict.best_rank)
    if verdict.settled_by:
        left = [format_setting(rank) for rank in verdict.left]
        sentence = (
            f"Which rank is enough is not settled: ranks {join_words(left)} are left; "
            f"{verdict.settled_by.describe(groups=data.example_groups)} would probably settle it."
        )
    elif len(arms) == 1:
        lower = "shown to be within the margin" if verdict.best_rank > min(verdict.compared) else "compared"
        sentence = f"Rank {best} is enough: it has the best score, and no lower rank is {lower}."
    else:
        pair = data.evidence.pair(*arms)
        difference = format_estimate(pair.difference, pair.interval) if pair else UNKNOWN
        sentence = (
            f"Rank {format_setting(verdict.rank)} is enough: it is the smallest rank that is shown to be within the "
            f"margin of every other, and differs from the best, rank {best}, by {difference}."
        )
    return RankAdvice(rank=verdict.rank, best_rank=verdict.best_rank, arms=arms, sentence=sentence)
