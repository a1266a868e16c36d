"""Several sweeps side by side: what an arm of each found, and what has to be known before their scores are compared.

Comes after `summary`; the terminal and the page show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.report.summary import ArmSummary, Summary
from lorasweep.report.tables import SweepData
from lorasweep.wording import (
    format_estimate,
    format_metric,
    format_score,
    format_settings,
    format_share,
    format_share_estimate,
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one sweep found for one arm."""

    score: str
    """On test data with its interval where it was confirmed, else the best of the search."""
    about: str
    """Share of full fine-tuning's gain, and settings."""
    is_confirmed: bool


def describe_cell(summary: Summary, name: str) -> Cell | None:
    """Returns what a sweep found for an arm, or None where it has no such arm."""
    arm = next((arm for arm in summary.arms if arm.name == name), None)
    if arm is None:
        return None
    if arm.best.params is None:
        return Cell(score="no complete trial", about="", is_confirmed=False)
    found, gain = arm.confirmed, format_gain(arm)
    share = f"{gain} of full's gain; " if arm.share_of_full_gain is not None or (found and found.share_interval) else ""
    alone = format_score(arm.best.score, beside=[other.best.score for other in summary.arms])
    score = format_estimate(found.mean, found.interval) if found else alone
    return Cell(score=score, about=f"{share}{format_settings(arm.best.params)}", is_confirmed=found is not None)


def format_gain(arm: ArmSummary) -> str:
    """Returns an arm's share of full fine-tuning's gain: on test data where it was confirmed, else in the search."""
    found = arm.confirmed
    if found and found.share_of_full_gain is not None:
        return format_share_estimate(found.share_of_full_gain, found.share_interval)
    return format_share(arm.share_of_full_gain)


def describe_differences(sweeps: Sequence[SweepData]) -> list[str]:
    """Returns what stands in the way of comparing the sweeps' scores, and what is not tested."""
    metrics = dict.fromkeys(format_metric(sweep.record.metric) for sweep in sweeps)
    sentences = []
    if len(metrics) > 1:
        sentences.append(f"The sweeps have different metrics ({', '.join(metrics)}): scores can't be compared.")
    for part, words in (("test", "test data"), ("validation", "validation data")):
        if len({_fingerprint(sweep, "data", part) for sweep in sweeps} - {None}) > 1:
            sentences.append(f"The sweeps have different {words}: a score of one is no score of another.")
    if len({_fingerprint(sweep, "base") for sweep in sweeps} - {None}) > 1:
        sentences.append("The sweeps have different base models.")
    if all(sweep.evidence.arms for sweep in sweeps):
        sentences.append("Arms were tested inside each sweep; differences between sweeps are not tested.")
    else:
        sentences.append(
            "Where there is no interval a score is one seed on validation data; "
            "whether differences between sweeps are more than chance is not tested."
        )
    return sentences


def _fingerprint(sweep: SweepData, *path: str) -> str | None:
    """Returns the fingerprint of the data or base that the first run with one has."""
    records = [*(rerun.record for rerun in sweep.reruns), *sweep.run_records]
    for record in records:
        found: Any = getattr(record, path[0]) if record else None
        for name in path[1:]:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, dict) and isinstance(found.get("fingerprint"), str):
            return str(found["fingerprint"])
    return None
