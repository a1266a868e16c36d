"""Patterns that name layers: `q_proj`, `0.mlp.up_proj`, `re:.*_proj`, `c_attn[q,v]`. `targets` applies them."""

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
    """Whether `name` is `ending` or ends with it after a dot: `q_proj` fits `layers.0.q_proj`, not `seq_proj`."""
    return name == ending or name.endswith(f".{ending}")


def fits_pattern(pattern: str, name: str) -> bool:
    """Whether a pattern other than `all-linear` names this layer.

    Raises:
        ValueError: Its regular expression is none.
    """
    if not pattern.startswith(REGEX_PREFIX):
        return is_name_ending(split_rows(pattern)[0], name)
    try:
        return re.fullmatch(pattern.removeprefix(REGEX_PREFIX), name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} must be a regular expression, but got {error}. Mend it.") from error


def first_fit(patterns: Iterable[str], name: str) -> str | None:
    """The first of the patterns that names this layer."""
    return next((pattern for pattern in patterns if fits_pattern(pattern, name)), None)


def split_rows(pattern: str) -> tuple[str, str]:
    """A pattern's name and what stands in brackets after it: `c_attn[q,v]` gives `c_attn` and `q,v`."""
    found = None if pattern.startswith(REGEX_PREFIX) else re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", pattern)
    return (found[1], found[2]) if found else (pattern, "")


def parse_rows(pattern: str, *, num_rows: int) -> Rows:
    """Row ranges that a pattern chooses in a layer of `num_rows` rows; empty for all of them.

    Letters of q, k, v mean thirds; `0:64,96:128` means the rows from 0 to 63 and from 96 to 127.

    Raises:
        ValueError: The brackets hold neither, or ranges that overlap, are empty or end above `num_rows`.
    """
    name, text = split_rows(pattern)
    words = text.split(",") if text else []
    if words and all(word in QKV for word in words) and num_rows % len(QKV) == 0:
        third = num_rows // len(QKV)
        ranges = [(QKV.index(word) * third, QKV.index(word) * third + third) for word in words]
    else:
        ranges = [_parse_range(word, pattern) for word in words]
    ordered = sorted(ranges)
    overlap = any(past > first for (_, past), (first, _) in pairwise(ordered))
    if overlap or any(not first < past <= num_rows for first, past in ordered):
        raise ValueError(
            f"The rows in {pattern!r} must be separate ranges within 0:{num_rows}, but got {text!r}. "
            f"Write them as `{name}[0:{num_rows // 2}]`."
        )
    return tuple(ordered)


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
    """Returns ` Did you mean ...?` with the name or name ending that is nearest to a pattern; empty if none is near."""
    endings = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2, 0))
    return nearest(split_rows(pattern)[0].removeprefix(REGEX_PREFIX), endings)


def _parse_range(word: str, pattern: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d+):(\d+)\s*", word)
    if not found:
        raise ValueError(
            f"The rows in {pattern!r} must be thirds (`q`, `k`, `v`) of a layer whose size 3 divides, or ranges, "
            f"but got {word!r}. Write a range as `0:64`."
        )
    return int(found[1]), int(found[2])
