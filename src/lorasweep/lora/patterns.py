"""Patterns that match names of layers: `q_proj`, `0.mlp.up_proj`, `re:.*_proj`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lorasweep.config.method import REGEX_PREFIX
from lorasweep.wording import suggest_nearest


def is_name_ending(ending: str, name: str) -> bool:
    """Returns whether a name is `ending` or ends with a dot and `ending`: `0.q_proj` with `q_proj`, not `seq_proj`."""
    return name == ending or name.endswith(f".{ending}")


def fits_pattern(pattern: str, name: str) -> bool:
    """Returns whether a pattern other than `all-linear` matches this name. Raises ValueError for a wrong expression."""
    if not pattern.startswith(REGEX_PREFIX):
        return is_name_ending(pattern, name)
    try:
        return re.fullmatch(pattern.removeprefix(REGEX_PREFIX), name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} must be a regular expression, but got an error: {error}. Correct it.") from error


def find_first_match(patterns: Iterable[str], name: str) -> str | None:
    """Returns the first pattern that matches this name; None if no pattern does."""
    return next((pattern for pattern in patterns if fits_pattern(pattern, name)), None)


def get_block_name(name: str) -> str | None:
    """Returns the block that contains a layer or parameter: `layers.3` for `layers.3.mlp.up`; None outside a block."""
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts, start=1) if part.isdecimal()), None)
    return None if end is None else ".".join(parts[:end])


def suggest_layer(pattern: str, names: Iterable[str]) -> str:
    """Returns the sentence ` Did you mean ...?` with the most similar layer name; empty if no name is similar."""
    # the last part, the last two parts, or all parts of each name
    endings = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2, 0))
    return suggest_nearest(pattern, endings)
