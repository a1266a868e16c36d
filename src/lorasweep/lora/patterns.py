"""Patterns that match names of layers: `q_proj`, `0.mlp.up_proj`, `re:.*_proj`, `c_attn[q,v]`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from lorasweep.lora.functional import Rows
from lorasweep.wording import nearest

ALL_LINEAR = "all-linear"
REGEX_PREFIX = "re:"
QKV = ("q", "k", "v")


def is_name_ending(ending: str, name: str) -> bool:
    """Returns whether `name` is `ending` or ends with it after a dot: `q_proj` for `0.q_proj`, not for `seq_proj`."""
    return name == ending or name.endswith(f".{ending}")


def fits_pattern(pattern: str, name: str) -> bool:
    """Returns whether a pattern other than `all-linear` matches this name.

    Raises:
        ValueError: The pattern is not a valid regular expression.
    """
    if not pattern.startswith(REGEX_PREFIX):
        return is_name_ending(split_rows(pattern)[0], name)
    try:
        return re.fullmatch(pattern.removeprefix(REGEX_PREFIX), name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} must be a regular expression, but got an error: {error}. Correct it.") from error


def first_fit(patterns: Iterable[str], name: str) -> str | None:
    """Returns the first pattern that matches this name."""
    return next((pattern for pattern in patterns if fits_pattern(pattern, name)), None)


def split_rows(pattern: str) -> tuple[str, str]:
    """Returns a pattern's name and the text in the brackets after it: `c_attn` and `q,v` for `c_attn[q,v]`."""
    found = None if pattern.startswith(REGEX_PREFIX) else re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", pattern)
    return (found[1], found[2]) if found else (pattern, "")


def parse_rows(pattern: str, *, num_rows: int) -> Rows:
    """Returns the row ranges that a pattern selects in a layer of `num_rows` rows; empty for all rows.

    Letters of q, k, v mean thirds; `0:64,96:128` means the rows from 0 to 63 and from 96 to 127.

    Raises:
        ValueError: The brackets hold anything else, or ranges that overlap, are empty or end above `num_rows`.
    """
    name, text = split_rows(pattern)
    ranges = []
    for part in text.split(",") if text else []:
        numbers = re.fullmatch(r"\s*(\d+):(\d+)\s*", part)
        if numbers:
            ranges.append((int(numbers[1]), int(numbers[2])))
        elif part in QKV and num_rows % len(QKV) == 0:
            third = num_rows // len(QKV)
            ranges.append((QKV.index(part) * third, (QKV.index(part) + 1) * third))
        else:
            ranges.append((0, 0))  # refused below
    ranges.sort()
    has_overlap = any(past > first for (_, past), (first, _) in pairwise(ranges))
    if has_overlap or any(not first < past <= num_rows for first, past in ranges):
        raise ValueError(
            f"The rows in {pattern!r} must be separate ranges within 0:{num_rows}, or thirds (q, k, v) if 3 divides "
            f"{num_rows}, but got {text!r}. Write them as `{name}[0:{num_rows // 2}]`."
        )
    return tuple(ranges)


def block_of(name: str) -> str | None:
    """Returns the name of the block that holds a layer or parameter: `layers.3` of `layers.3.mlp.up`; None outside."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts, start=1) if part.isdecimal()), None)
    return None if end is None else ".".join(parts[:end])


def block_index(name: str) -> int | None:
    """Returns the index of the block that holds a layer or parameter: 3 of `layers.3.mlp.up`; None outside."""
    block = block_of(name)
    return None if block is None else int(block.rpartition(".")[2])


def nearest_layer(pattern: str, names: Iterable[str]) -> str:
    """Returns ` Did you mean ...?` with the nearest name or name ending; empty if no name is near the pattern."""
    endings = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2, 0))
    return nearest(split_rows(pattern)[0].removeprefix(REGEX_PREFIX), endings)
