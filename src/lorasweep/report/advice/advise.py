"""All advice of one sweep."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.report.advice.costs import KeptGain, compare_costs
from lorasweep.report.advice.edges import describe_edges
from lorasweep.report.advice.ranks import RankAdvice, advise_ranks
from lorasweep.report.advice.rates import RateAdvice, RateTrend, advise_rates, fit_trends
from lorasweep.report.sweep_data import SweepData


@dataclass(frozen=True, kw_only=True)
class Advice:
    """All advice of one sweep; fields that nothing supports are empty."""

    ranks: tuple[RankAdvice, ...]
    rates: tuple[RateAdvice, ...]
    trends: tuple[RateTrend, ...]
    kept: tuple[KeptGain, ...]
    next_searches: tuple[str, ...]
    """One sentence for each range that should be searched further."""


def advise(data: SweepData) -> Advice:
    """Returns all advice of a sweep."""
    rates = advise_rates(data)
    return Advice(
        ranks=tuple(advise_ranks(data)),
        rates=tuple(rates),
        trends=tuple(fit_trends(data, rates)),
        kept=tuple(compare_costs(data)),
        next_searches=tuple(describe_edges(data)),
    )
