"""What an inspection says in plain sentences. Comes after `measure` and `truncation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from lorasweep.runs.inspect.measure import LayerRow, Side, mean_similarity
from lorasweep.runs.inspect.restore_weights import FinishedRun
from lorasweep.runs.inspect.subspaces import Similarity
from lorasweep.runs.inspect.truncation import KEPT_SHARE, TruncatedScore, Truncation
from lorasweep.wording import format_metric, format_score, format_share

COMPARED = (1, 4, 16)
"""Numbers of directions whose similarity is said in words."""
SIDE_WORDS: Mapping[Side, str] = {"a": "of A", "input": "that they read", "output": "that they write"}


def describe_run(
    run: FinishedRun, rows: Sequence[LayerRow], truncation: Truncation | None, *, note: str | None
) -> tuple[str, ...]:
    """Returns what a run's weights say: size, rank, what a smaller one would score, where it is, what it amplifies.

    Args:
        run: The run.
        rows: Its changed weights.
        truncation: Scores of smaller ranks.
        note: Why there are none, where somebody might expect them.
    """
    sentences = [_size(run, rows), _ranks(rows)]
    sentences += _truncation(run, rows, truncation) if truncation else [note or ""]
    sentences += [_places(rows), _amplification(rows)]
    return tuple(sentence for sentence in sentences if sentence)


def describe_comparison(first: str, second: str, values: Mapping[tuple[str, Side], Similarity]) -> str:
    """Returns how far the directions of two runs are the same, by each side that both have."""
    parts = []
    for side, words in SIDE_WORDS.items():
        cells = mean_similarity(values, side)
        counts = [n for n in COMPARED if (n, n) in cells]
        if counts:
            shared, expected = (", ".join(f"{cells[n, n][which]:.2f}" for n in counts) for which in (0, 1))
            parts.append(f"of the first {', '.join(map(str, counts))} {words} {shared} (random ones: {expected})")
    return f"{first} and {second} share of their directions (φ, mean over layers) {'; '.join(parts)}."


def _size(run: FinishedRun, rows: Sequence[LayerRow]) -> str:
    trained = _trained_ranks(rows)
    at_rank = f" at rank {trained}" if trained else ""
    base = sum(row.base_norm**2 for row in rows) ** 0.5
    share = sum(row.change_norm**2 for row in rows) ** 0.5 / base if base else None
    return (
        f"`{run.method}`{at_rank} changed {_counted(len(rows), 'weight')} of the base by {format_share(share)} of "
        "their norm."
    )


def _ranks(rows: Sequence[LayerRow]) -> str:
    matrices = [row for row in rows if row.effective_rank is not None]
    if not matrices:
        return "No matrix changed, so there is no rank to speak of."
    entropy = median(row.effective_rank or 0.0 for row in matrices)
    stable = median(row.stable_rank or 0.0 for row in matrices)
    held = median(row.energy_rank or 0 for row in matrices)
    return (
        f"Its effective rank is {entropy:.1f} and its stable rank {stable:.1f}; 90 % of the squared norm lies in "
        f"{_counted(round(held), 'direction')} (medians over layers)."
    )


def _truncation(run: FinishedRun, rows: Sequence[LayerRow], truncation: Truncation) -> list[str]:
    enough, whole = truncation.enough, truncation.scores[-1]
    metric = format_metric(run.record.metric)
    if enough is None:
        return [
            f"The whole change scores {format_score(whole.score)} {metric} and none of it "
            f"{format_score(truncation.scores[0].score)}: it gains nothing that a smaller rank could keep."
        ]
    trained = _trained_ranks(rows)
    by_method = "Trained in full" if run.method == "full" else f"Trained by `{run.method}`"
    lead = f"Trained at rank {trained}" if trained else by_method
    if enough.rank >= whole.rank or trained == str(enough.rank):
        found = f"{lead}, it needs all of it to keep {KEPT_SHARE:.0%} of its gain"
    else:
        found = f"{lead}, {enough.rank} would do: cut to that it keeps {KEPT_SHARE:.0%} of its gain"
    less = _cheaper(truncation, enough)
    return [found + (f"; {less.rank} loses {format_score(truncation.loss(less))} {metric}" if less else "") + "."]


def _cheaper(truncation: Truncation, enough: TruncatedScore) -> TruncatedScore | None:
    """The largest rank that was tried at half of what is enough or below, and not 0."""
    smaller = [row for row in truncation.scores if 0 < row.rank <= enough.rank // 2]
    return smaller[-1] if smaller else None


def _places(rows: Sequence[LayerRow]) -> str:
    kinds: dict[str, float] = {}
    blocks: dict[int, float] = {}
    for row in [row for row in rows if row.effective_rank is not None] or rows:
        kinds[row.kind] = kinds.get(row.kind, 0.0) + row.norm_share
        if row.block is not None:
            blocks[row.block] = blocks.get(row.block, 0.0) + row.norm_share
    if len(kinds) < 2:
        return ""
    most, least = max(kinds, key=lambda kind: kinds[kind]), min(kinds, key=lambda kind: kinds[kind])
    text = f"Of the squared norm `{most}` carries the most ({format_share(kinds[most])}) and `{least}` the least "
    text += f"({format_share(kinds[least])})"
    if len(blocks) < 2:
        return f"{text}."
    block = max(blocks, key=lambda index: blocks[index])
    return f"{text}; block {block} of {min(blocks)} to {max(blocks)} carries {format_share(blocks[block])}."


def _amplification(rows: Sequence[LayerRow]) -> str:
    known = [row for row in rows if row.amplification]
    if not known:
        return ""
    factor = median(row.amplification or 0.0 for row in known)
    random = median((row.base_in_change or 0.0) / row.base_in_random for row in known if row.base_in_random)
    own = median((row.base_in_change or 0.0) / row.base_in_own for row in known if row.base_in_own)
    return (
        f"In its own directions the change is {factor:.2f} times the base; there the base is {random:.1f} times what "
        f"it is in random directions and {format_share(own)} of what it is in its own largest (medians over layers)."
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _trained_ranks(rows: Sequence[LayerRow]) -> str:
    ranks = sorted({row.trained_rank for row in rows if row.trained_rank is not None})
    return "" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
