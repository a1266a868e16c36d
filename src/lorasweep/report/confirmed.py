"""What the confirm stage shows in plain sentences: each arm's score with its interval, and the verdict on a pair.

Comes after `tables` and `evidence`, before `headline` and the page.
"""

from __future__ import annotations

from collections.abc import Collection

from lorasweep.report.evidence import Evidence, Pair
from lorasweep.report.evidence.verdicts import LEVEL
from lorasweep.report.tables import Arm, SweepData
from lorasweep.wording import (
    format_count,
    format_difference,
    format_estimate,
    format_metric,
    format_settings,
    format_share,
    format_share_estimate,
)

MAX_ARMS = 4
"""Of more arms than this only the ones that matter most get a sentence: the others are in the table."""


def describe_confirmed(data: SweepData, *, prominent: Collection[str] = ()) -> list[str]:
    """Returns the main findings on test data; empty where nothing was confirmed.

    Args:
        data: The sweep.
        prominent: Arms that get a sentence even where there are many, beside the best one.
    """
    if not data.evidence.arms:
        return []
    others = [arm for arm in data.arms if arm.row.method not in ("frozen", "full") and data.evidence.arm(arm.name)]
    best = min(others, key=lambda arm: data.sign * _mean(arm, data), default=None)
    shown = [arm for arm in others if len(others) <= MAX_ARMS or arm is best or arm.name in prominent]
    rest = len(others) - len(shown)
    return [
        _about(data),
        *_ends(data),
        *(_arm_sentence(arm, data) for arm in shown),
        *([f"The other {rest} {'arm is' if rest == 1 else 'arms are'} in the table below."] if rest else []),
    ]


def describe_pair(pair: Pair, *, first: str | None = None, second: str | None = None) -> str:
    """Returns the verdict on a pair in words, without the full stop.

    Args:
        pair: The pair.
        first: What the first arm is called; None for its name.
        second: The same for the second.
    """
    left, right = first or f"`{pair.first}`", second or f"`{pair.second}`"
    size = abs(pair.difference or 0.0)
    ends = sorted(abs(end) for end in pair.interval) if pair.interval else None
    if pair.verdict in ("better", "worse"):
        by = format_estimate(size, (ends[0], ends[1]) if ends and not _crosses(pair) else None)
        return f"{left} is {pair.verdict} than {right} by {by}"
    if pair.verdict == "not tested":
        return f"{left} and {right} were not tested: {pair.reason}"
    difference = format_estimate(pair.difference, pair.interval)
    alone = (
        "; the interval of this pair alone leaves out 0, but not after correction for the number of pairs"
        if pair.p_value is not None and pair.p_value < LEVEL
        else ""
    )
    return (
        f"{left} and {right} are not distinguishable: they differ by {difference}, and the smallest difference that "
        f"could have been seen is {format_difference(pair.smallest_visible)}{alone}"
    )


def _crosses(pair: Pair) -> bool:
    return pair.interval is not None and pair.interval[0] < 0 < pair.interval[1]


def _mean(arm: Arm, data: SweepData) -> float:
    found = data.evidence.arm(arm.name)
    return found.mean if found else 0.0


def _about(data: SweepData) -> str:
    evidence = data.evidence
    order = "lower" if data.record.direction == "minimize" else "higher"
    counts = sorted({len(arm.seeds) for arm in evidence.arms if arm.name != evidence.base})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "1"
    examples = f" and {evidence.num_examples:,} test examples" if evidence.num_examples else ""
    plural = "seed" if counts and counts[-1] == 1 else "seeds"
    return (
        f"Scores are {format_metric(data.record.metric)} on test data that no search has seen, {order} is better: "
        f"means over {seeds} fresh {plural} with 95 % intervals over seeds{examples}."
    )


def _ends(data: SweepData) -> list[str]:
    evidence = data.evidence
    base, full = evidence.arm(evidence.base or ""), evidence.arm(evidence.full or "")
    if base is None and full is None:
        return ["Neither the frozen base nor full fine-tuning was confirmed, so no share of a gain is given."]
    said = []
    if base:
        said.append(f"the frozen base scores {format_estimate(base.mean, base.interval)}")
    if full:
        scored = "full fine-tuning" if base else "full fine-tuning scores"
        settings = _settings(next((arm for arm in data.arms if arm.name == full.name), None))
        said.append(f"{scored} {format_estimate(full.mean, full.interval)}{settings}")
    text = " and ".join(said)
    if base and full and full.share_of_full_gain is None:
        text += ": it gained nothing, so no share is given"
    elif not (base and full):
        text += "; without the other end of the scale no share of full fine-tuning's gain is given"
    return [f"{text[0].upper()}{text[1:]}."]


def _settings(arm: Arm | None) -> str:
    return f" with {format_settings(arm.winner.params)}" if arm and arm.winner and arm.winner.params else ""


def _arm_sentence(arm: Arm, data: SweepData) -> str:
    found = data.evidence.arm(arm.name)
    if found is None:
        return ""
    share = (
        f", {format_share_estimate(found.share_of_full_gain, found.share_interval)} of what full fine-tuning gains"
        if found.share_of_full_gain is not None
        else ""
    )
    pair = data.evidence.pair(arm.name, data.evidence.full or "")
    verdict = f" {_against_full(pair, arm.name)}." if pair else ""
    score = f"{format_estimate(found.mean, found.interval)}{_settings(arm)}"
    return f"`{arm.name}` scores {score}{share}{_cost(arm)}.{verdict}"


def _against_full(pair: Pair, arm: str) -> str:
    text = describe_pair(pair.seen_from(arm), first="it", second="full fine-tuning")
    return f"{text[0].upper()}{text[1:]}"


def _cost(arm: Arm) -> str:
    record = arm.winner.record if arm.winner else None
    if record is None:
        return ""
    share = format_share(record.trainable_fraction)
    return f", training {format_count(record.trainable_params)} parameters ({share} of the base)"


def describe_limits(evidence: Evidence) -> list[str]:
    """Returns at which level verdicts are made, and what the evidence can't say."""
    count = evidence.num_compared
    if count == 0:
        return list(evidence.notes)
    corrected = f", corrected for {count} comparisons (Holm)" if count > 1 else ""
    return [f"Verdicts are at the 5 % level{corrected}; an interval is for one number alone.", *evidence.notes]
