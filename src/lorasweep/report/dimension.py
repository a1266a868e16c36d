"""How few numbers keep most of what full fine-tuning gains: d90, from the arms of `method=intrinsic`."""

from __future__ import annotations

from dataclasses import dataclass

from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.tables import SweepData
from lorasweep.wording import format_share

KEPT = 0.9
"""Share of full fine-tuning's gain that the dimension in d90 keeps."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a dimension keeps of full fine-tuning's gain."""

    share: float
    interval: Interval | None
    """95 %, over seeds; None where the share is the search's."""


def kept_by_dimension(data: SweepData) -> dict[int, Kept]:
    """Returns each dimension tried, in rising order, and what it keeps.

    On test data where each of them was confirmed, else by the best score of the search. It is empty where nothing of
    `method=intrinsic` is complete or the sweep has no frozen base or full fine-tuning.
    """
    searched, confirmed = _searched(data), _confirmed(data)
    return dict(sorted((confirmed if confirmed.keys() == searched.keys() else searched).items()))


def find_d90(data: SweepData) -> int | None:
    """Returns the smallest dimension that keeps 90 % of full fine-tuning's gain, or None where none is known to.

    *Differs* from arXiv 1804.08838 and 2012.13255, which ask for 90 % of full's score: a gain is measured from the
    frozen base, so that the number means the same for every metric.
    """
    return next((dim for dim, kept in kept_by_dimension(data).items() if kept.share >= KEPT), None)


def describe_d90(data: SweepData) -> list[str]:
    """Returns what the sweep says of d90 in sentences; none where it can't say anything."""
    tried = kept_by_dimension(data)
    if not tried:
        return []
    where = "on test data" if next(iter(tried.values())).interval else "in the search"
    listed, d90 = f"of the dimensions tried ({', '.join(map(str, tried))})", find_d90(data)
    if d90 is None:
        most = max(tried, key=lambda dim: tried[dim].share)
        return [
            f"d90 is above {max(tried)}: none {listed} keeps 90 % of full fine-tuning's gain {where}; "
            f"{most} keeps most, {_format(tried[most])}."
        ]
    sentences = [
        f"d90 = {d90}: the smallest {listed} that keeps 90 % of full fine-tuning's gain {where}; "
        f"it keeps {_format(tried[d90])}."
    ]
    if len(tried) > 1 and d90 == min(tried):
        sentences.append("It is the smallest that was tried: smaller ones may do.")
    if short := [str(dim) for dim, kept in tried.items() if dim > d90 and kept.share < KEPT]:
        sentences.append(f"Of larger ones, {', '.join(short)} did not: search their learning rates longer.")
    return sentences


def _searched(data: SweepData) -> dict[int, Kept]:
    shares: dict[int, float] = {}
    for trial in data.trials:
        dim = trial.number_at("method.dim") if trial.method == "intrinsic" and trial.is_complete else None
        share = data.share_of_full_gain(trial.value)
        if dim is not None and share is not None:
            shares[int(dim)] = max(share, shares.get(int(dim), share))
    return {dim: Kept(share=share, interval=None) for dim, share in shares.items()}


def _confirmed(data: SweepData) -> dict[int, Kept]:
    found: dict[int, Kept] = {}
    for arm in data.arms:
        dim = arm.best.number_at("method.dim") if arm.row.method == "intrinsic" and arm.best else None
        evidence = data.evidence.arm(arm.name)
        if dim is not None and evidence and evidence.share_of_full_gain is not None and evidence.share_interval:
            found[int(dim)] = Kept(share=evidence.share_of_full_gain, interval=evidence.share_interval)
    return found


def _format(kept: Kept) -> str:
    if kept.interval is None:
        return format_share(kept.share)
    low, high = kept.interval
    return f"{format_share(kept.share)} (95 % interval {format_share(low)} to {format_share(high)})"
