"""Sentences on the measurements of an inspection."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lorasweep.runs.inspect.measures import MEAN, LayerRow, Overlap, relative_norm
from lorasweep.wording import format_share

DESCRIBED_COUNTS = (1, 4, 16)
"""Numbers of top directions whose φ is in a sentence."""


def describe_run(method: str, rows: Sequence[LayerRow]) -> tuple[str, ...]:
    """Returns sentences on the size of the updates and their rank."""
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
    return tuple(sentences)


def describe_overlaps(first: str, second: str, overlaps: Sequence[Overlap]) -> str:
    """Returns a sentence on the mean φ over layers of two runs' top directions."""
    means = {row.i: row for row in overlaps if row.layer == MEAN and row.i == row.j}
    shares = [
        f"{means[n].phi:.2f} of the first {f'{n} directions' if n > 1 else 'direction'} (random: {means[n].random:.2f})"
        for n in DESCRIBED_COUNTS
        if n in means
    ]
    return f"{first} and {second} share (φ, mean over layers) {', '.join(shares)}."
