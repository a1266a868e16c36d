"""All advice of one sweep, as numbers and in sentences. Last of this package."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.report.advice import costs, rates
from lorasweep.report.advice.costs import KeptGain, advise_costs
from lorasweep.report.advice.edges import describe_edges
from lorasweep.report.advice.ranks import RankAdvice, advise_rank
from lorasweep.report.advice.rates import RateAdvice, RateTrend, advise_rates, find_trends
from lorasweep.report.tables import SweepData


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do with what a sweep found."""

    ranks: tuple[RankAdvice, ...]
    rates: tuple[RateAdvice, ...]
    trends: tuple[RateTrend, ...]
    kept: tuple[KeptGain, ...]
    rank_sentences: tuple[str, ...]
    kept_sentences: tuple[str, ...]
    rate_sentences: tuple[str, ...]
    next_sentences: tuple[str, ...]
    """Where to search next."""


def advise(data: SweepData) -> Advice:
    """Returns what to do with what the sweep found; parts that nothing supports are empty."""
    ranks, kept, found = advise_rank(data), advise_costs(data), advise_rates(data)
    trends = find_trends(data, found)
    return Advice(
        ranks=tuple(ranks),
        rates=tuple(found),
        trends=tuple(trends),
        kept=tuple(kept),
        rank_sentences=tuple(advice.sentence for advice in ranks),
        kept_sentences=tuple(costs.sentences_of(kept)),
        rate_sentences=tuple(rates.sentences_of(found, trends)),
        next_sentences=tuple(describe_edges(data)),
    )
