"""Sentences on the measurements of an inspection."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lorasweep.runs.inspect.measures import MEAN, LayerRow, Overlap, relative_norm
from lorasweep.runs.inspect.truncation import KEPT_FRACTION, RankScore, find_enough_rank
from lorasweep.wording import format_metric, format_score, format_share

DESCRIBED_COUNTS = (1, 4, 16)
"""Numbers of top directions whose φ is in a sentence."""


def describe_run(
    method: str, metric: str, rows: Sequence[LayerRow], scores: Sequence[RankScore] = ()
) -> tuple[str, ...]:
    """Returns sentences on the size of the updates, their rank, and the scores of smaller ranks."""
    ranks = sorted({row.trained_rank for row in rows if row.trained_rank is not None})
    trained = "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    at_rank = f" at rank {trained}" if trained else ""
    weights = f"{len(rows)} weight{'s' if len(rows) > 1 else ''}"
    sentences = [
        f"`{method}`{at_rank} changed {weights} of the base by {format_share(relative_norm(rows))} of their norm."
    ]
    if directions := [row.energy_rank for row in rows if row.energy_rank is not None]:
        count = round(median(directions))
        plural = "s" if count > 1 else ""
        sentences.append(f"90 % of the squared norm lies in {count} direction{plural} (median over layers).")
    if scores:
        sentences.append(_describe_scores(method, metric, trained, scores))
    return tuple(sentences)


def _describe_scores(method: str, metric: str, trained: str, scores: Sequence[RankScore]) -> str:
    enough, full, unit = find_enough_rank(scores), scores[-1], format_metric(metric)
    if enough is None:
        return (
            f"The whole update scores {format_score(full.score)} {unit} and no update {format_score(scores[0].score)}: "
            "the update brings no gain, so no smaller rank can keep it."
        )
    how = f"at rank {trained}" if trained else f"by `{method}`"
    if enough.rank >= full.rank or trained == str(enough.rank):
        sentence = f"Trained {how}, it needs its whole rank to keep {KEPT_FRACTION:.0%} of its gain"
    else:
        sentence = (
            f"Trained {how}, rank {enough.rank} is enough: cut to it, it keeps at least {KEPT_FRACTION:.0%} of its gain"
        )
    smaller = [row for row in scores if 0 < row.rank <= enough.rank // 2]
    return (
        f"{sentence}; rank {smaller[-1].rank} loses {format_score(smaller[-1].loss)} {unit}."
        if smaller
        else f"{sentence}."
    )


def describe_overlaps(first: str, second: str, overlaps: Sequence[Overlap]) -> str:
    """Returns a sentence on the mean φ over layers of two runs' top directions."""
    means = {row.i: row for row in overlaps if row.layer == MEAN and row.i == row.j}
    shares = [
        f"{means[n].phi:.2f} of the first {f'{n} directions' if n > 1 else 'direction'} (random: {means[n].random:.2f})"
        for n in DESCRIBED_COUNTS
        if n in means
    ]
    return f"{first} and {second} share (φ, mean over layers) {', '.join(shares)}."
