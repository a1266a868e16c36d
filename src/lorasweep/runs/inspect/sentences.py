"""The sentences of an inspection."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from lorasweep.runs.inspect.layers import LayerChange, relative_norm, shares_by
from lorasweep.runs.inspect.restore_weights import FinishedRun
from lorasweep.runs.inspect.subspaces import MEAN, Overlap
from lorasweep.runs.inspect.truncation import KEPT_FRACTION, Truncation
from lorasweep.wording import format_metric, format_score, format_share

TOLD_DIRECTIONS = (1, 4, 16)
"""Numbers of top directions whose φ is told in a sentence."""


def describe_run(
    run: FinishedRun, rows: Sequence[LayerChange], truncation: Truncation | None, *, note: str | None
) -> tuple[str, ...]:
    """Returns sentences on the size of a run's change, its rank, the score of smaller ranks, and where it is.

    Args:
        run: The run.
        rows: Its changed weights.
        truncation: Scores of smaller ranks.
        note: Why there are no scores, where a reader may expect them.
    """
    trained = _trained_ranks(rows)
    at_rank = f" at rank {trained}" if trained else ""
    weights = f"{len(rows)} weight{'s' if len(rows) > 1 else ''}"
    size = (
        f"`{run.method}`{at_rank} changed {weights} of the base by {format_share(relative_norm(rows))} of their norm."
    )
    matrices = [row for row in rows if row.effective_rank is not None]
    sentences = [size, _describe_ranks(matrices)]
    sentences.append(_describe_truncation(run, trained, truncation) if truncation else note or "")
    sentences.append(_describe_places(matrices or rows))
    return tuple(sentence for sentence in sentences if sentence)


def describe_overlaps(first: str, second: str, overlaps: Sequence[Overlap]) -> str:
    """Returns a sentence on the mean φ over layers of two runs' top directions."""
    means = {row.i: row for row in overlaps if row.layer == MEAN and row.i == row.j}
    told = [
        f"{means[n].phi:.2f} of the first {f'{n} directions' if n > 1 else 'direction'} (random: {means[n].random:.2f})"
        for n in TOLD_DIRECTIONS
        if n in means
    ]
    return f"{first} and {second} share (φ, mean over layers) {', '.join(told)}."


def _describe_ranks(matrices: Sequence[LayerChange]) -> str:
    if not matrices:
        return "No matrix changed, so there is no rank to speak of."
    entropy = median(row.effective_rank or 0.0 for row in matrices)
    stable = median(row.stable_rank or 0.0 for row in matrices)
    held = round(median(row.energy_rank or 0 for row in matrices))
    return (
        f"Its effective rank is {entropy:.1f} and its stable rank {stable:.1f}; 90 % of the squared norm lies in "
        f"{held} direction{'s' if held > 1 else ''} (medians over layers)."
    )


def _describe_truncation(run: FinishedRun, trained: str, truncation: Truncation) -> str:
    enough, whole = truncation.enough, truncation.scores[-1]
    metric = format_metric(run.record.metric)
    if enough is None:
        return (
            f"The whole change scores {format_score(whole.score)} {metric} and none of it "
            f"{format_score(truncation.scores[0].score)}: it gains nothing that a smaller rank could keep."
        )
    how = f"at rank {trained}" if trained else "in full" if run.method == "full" else f"by `{run.method}`"
    if enough.rank >= whole.rank or trained == str(enough.rank):
        found = f"Trained {how}, it needs all of it to keep {KEPT_FRACTION:.0%} of its gain"
    else:
        found = f"Trained {how}, rank {enough.rank} is enough: cut to it, it keeps {KEPT_FRACTION:.0%} of its gain"
    smaller = [row for row in truncation.scores if 0 < row.rank <= enough.rank // 2]
    less = f"; rank {smaller[-1].rank} loses {format_score(truncation.loss(smaller[-1]))} {metric}" if smaller else ""
    return f"{found}{less}."


def _describe_places(rows: Sequence[LayerChange]) -> str:
    """Returns a sentence on the kinds of layer and the block with the largest and smallest shares of the change."""
    kinds = shares_by(rows, "kind")
    blocks = shares_by([row for row in rows if row.block is not None], "block")
    if len(kinds) < 2:
        return ""
    most, least = next(iter(kinds)), list(kinds)[-1]
    text = f"`{most}` has the largest share of the squared norm ({format_share(kinds[most])}) and `{least}` the "
    text += f"smallest ({format_share(kinds[least])})"
    if len(blocks) < 2:
        return f"{text}."
    block = next(iter(blocks))
    return f"{text}; block {block} of {min(blocks)} to {max(blocks)} has {format_share(blocks[block])}."


def _trained_ranks(rows: Sequence[LayerChange]) -> str:
    ranks = sorted({row.trained_rank for row in rows if row.trained_rank is not None})
    return "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
