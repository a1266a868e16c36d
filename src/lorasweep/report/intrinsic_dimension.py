"""The intrinsic dimension d90: the smallest dimension of `method=intrinsic` that keeps 90 % of full's gain."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.sweep_data import SweepData
from lorasweep.wording import format_share

KEPT_FRACTION = 0.9
"""The share of full fine-tuning's gain that d90 keeps."""


@dataclass(frozen=True, kw_only=True)
class KeptShare:
    """The share of full fine-tuning's gain that a dimension keeps."""

    share: float
    interval: Interval | None = None
    """The 95 % interval on test data; None if the share is that of the search."""

    def __str__(self) -> str:
        if self.interval is None:
            return format_share(self.share)
        low, high = self.interval
        return f"{format_share(self.share)} (95 % interval {format_share(low)} to {format_share(high)})"


def kept_by_dimension(data: SweepData) -> dict[int, KeptShare]:
    """Returns the share of full fine-tuning's gain that each dimension keeps, by rising dimension.

    The shares are those of test data if every dimension was confirmed, else those of the best scores of the search.
    The result is empty without complete trials of `method=intrinsic`, without a frozen base, or without `full`.
    """
    searched: dict[int, KeptShare] = {}
    confirmed: dict[int, KeptShare] = {}
    for arm in data.arms:
        if arm.row.method != "intrinsic":
            continue
        for trial in arm.trials:
            dim, share = trial.number_at("method.dim"), data.share_of_full_gain(trial.value)
            if trial.is_complete and dim is not None and share is not None:
                best = searched.get(int(dim))
                searched[int(dim)] = KeptShare(share=max(share, best.share) if best else share)
        dim = arm.best.number_at("method.dim") if arm.best else None
        evidence = data.evidence.arm(arm.name)
        if dim is not None and evidence and evidence.share_of_full_gain is not None and evidence.share_interval:
            confirmed[int(dim)] = KeptShare(share=evidence.share_of_full_gain, interval=evidence.share_interval)
    return dict(sorted((confirmed if confirmed.keys() == searched.keys() else searched).items()))


def find_d90(data: SweepData) -> int | None:
    """Returns the smallest dimension that keeps 90 % of full fine-tuning's gain, or None if no dimension does.

    arXiv 1804.08838 and 2012.13255 ask for 90 % of full's *score*. Here the gain over the frozen base counts, so that
    the number means the same for every metric.
    """
    return next((dim for dim, kept in kept_by_dimension(data).items() if kept.share >= KEPT_FRACTION), None)


def describe_d90(data: SweepData) -> list[str]:
    """Returns sentences about d90; none if no dimension was tried."""
    tried, d90 = kept_by_dimension(data), find_d90(data)
    if not tried:
        return []
    where = "on test data" if next(iter(tried.values())).interval else "in the search"
    listed = f"of the dimensions tried ({', '.join(map(str, tried))})"
    if d90 is None:
        best = max(tried, key=lambda dim: tried[dim].share)
        return [
            f"d90 is above {max(tried)}: none {listed} keeps 90 % of full fine-tuning's gain {where}; "
            f"{best} keeps most, {tried[best]}."
        ]
    sentences = [
        f"d90 = {d90}: the smallest {listed} that keeps 90 % of full fine-tuning's gain {where}; it keeps {tried[d90]}."
    ]
    if len(tried) > 1 and d90 == min(tried):
        sentences.append("It is the smallest that was tried: smaller ones may do.")
    if short := [str(dim) for dim, kept in tried.items() if dim > d90 and kept.share < KEPT_FRACTION]:
        sentences.append(f"Of larger ones, {', '.join(short)} did not: search their learning rates longer.")
    return sentences
