"""Patterns that match names of layers: `q_proj`, `0.mlp.up_proj`, `re:.*_proj`, `c_attn[q,v]`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

import regex

from lorasweep.config.method import REGEX_PREFIX
from lorasweep.lora.functional import RowRanges
from lorasweep.wording import suggest_nearest

QKV_LETTERS = ("q", "k", "v")
MAX_MATCH_S = 1.0
"""Maximum seconds for one name. Somebody's adapter may have an expression for which a name takes years."""
_compile = lru_cache(maxsize=10_000)(regex.compile)
"""An adapter may have a pattern for each layer, and each is compared with all layers. `regex` keeps only 500."""


def is_name_ending(ending: str, name: str) -> bool:
    """Returns whether a name is `ending` or ends with a dot and `ending`: `0.q_proj` with `q_proj`, not `seq_proj`."""
    return name == ending or name.endswith(f".{ending}")


def fits_pattern(pattern: str, name: str) -> bool:
    """Returns whether a pattern other than `all-linear` matches this name. Raises ValueError for a wrong expression."""
    if not pattern.startswith(REGEX_PREFIX):
        return is_name_ending(split_pattern(pattern)[0], name)
    try:
        return _compile(pattern.removeprefix(REGEX_PREFIX)).fullmatch(name, timeout=MAX_MATCH_S) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} must be a regular expression, but got an error: {error}. Correct it.") from error


def find_first_match(patterns: Iterable[str], name: str) -> str | None:
    """Returns the first pattern that matches this name; None if no pattern does."""
    return next((pattern for pattern in patterns if fits_pattern(pattern, name)), None)


def split_pattern(pattern: str) -> tuple[str, str]:
    """Returns the name and the text in brackets of a pattern: `c_attn` and `q,v` for `c_attn[q,v]`."""
    match = None if pattern.startswith(REGEX_PREFIX) else re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", pattern)
    return (match[1], match[2]) if match else (pattern, "")


def parse_row_ranges(pattern: str, *, num_rows: int) -> RowRanges:
    """Returns the row ranges that a pattern selects in a layer of `num_rows` rows; empty for all rows.

    In the brackets, `q`, `k` and `v` each stand for a third of the rows, and `0:64` for the rows 0 to 63.

    Raises:
        ValueError: The text in brackets has another form, or its ranges overlap, are empty or end above `num_rows`.
    """
    name, text = split_pattern(pattern)
    ranges = []
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"\s*(\d+):(\d+)\s*", part)
        if match:
            ranges.append((int(match[1]), int(match[2])))
        elif part in QKV_LETTERS and num_rows % len(QKV_LETTERS) == 0:
            third = num_rows // len(QKV_LETTERS)
            ranges.append((QKV_LETTERS.index(part) * third, (QKV_LETTERS.index(part) + 1) * third))
        else:
            ranges.append((0, 0))  # an empty range, which is refused below
    ranges.sort()
    has_overlap = any(end > first for (_, end), (first, _) in pairwise(ranges))
    if has_overlap or any(not first < end <= num_rows for first, end in ranges):
        raise ValueError(
            f"The rows in {pattern!r} must be separate ranges within 0:{num_rows}, or thirds (q, k, v) if 3 divides "
            f"{num_rows}, but got {text!r}. Write them as `{name}[0:{num_rows // 2}]`."
        )
    return tuple(ranges)


def get_block_name(name: str) -> str | None:
    """Returns the block that contains a layer or parameter: `layers.3` for `layers.3.mlp.up`; None outside a block."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts, start=1) if part.isdecimal()), None)
    return None if end is None else ".".join(parts[:end])


def get_block_index(name: str) -> int | None:
    """Returns the index of a layer's or parameter's block: 3 for `layers.3.mlp.up`; None outside a block."""
    block = get_block_name(name)
    return None if block is None else int(block.rpartition(".")[2])


def suggest_layer(pattern: str, names: Iterable[str]) -> str:
    """Returns the sentence ` Did you mean ...?` with the most similar layer name; empty if no name is similar."""
    # the last part, the last two parts, or all parts of each name
    endings = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2, 0))
    return suggest_nearest(split_pattern(pattern)[0], endings)
