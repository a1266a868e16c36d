"""Which rows are which split's: splits off what is missing, by content alone, and counts what splits share.

Nothing is drawn: a row's split depends on its own content, so it does not move when others are added or reordered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from lorasweep.errors import ConfigError

BUCKETS: Mapping[str, range] = {"validation": range(10), "test": range(10, 20)}
"""Of a hundred buckets, those whose rows a split gets when it is split off; a tenth each."""


def content_key(texts: Iterable[str]) -> int:
    """Returns a number of 64 bits that texts share if they are equal apart from case and white space."""
    plain = "\n".join([" ".join(text.split()).casefold() for text in texts])  # in which no text has a line break
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")


def split_rows(keys: Sequence[int], *, off: Collection[str], key: str = "data.train") -> dict[str, list[int]]:
    """Assigns rows to `train` and to each split that is to be split off; rows with the same key stay together.

    A split gets the rows whose key modulo 100 is in its `BUCKETS`; if there is none, those of the smallest key that is
    still free; and the largest keys stay free where nothing would be left for another split. So no split is empty.

    Args:
        keys: Content key of each row.
        off: `validation`, `test` or both.
        key: Where the rows come from, for messages.

    Raises:
        ConfigError: There are fewer different rows than splits.
    """
    free = sorted(set(keys))
    if len(free) <= len(off):
        raise ConfigError(
            f"`{key}` must have at least {len(off) + 1} different rows, but has {len(free)}, so that "
            f"{' and '.join(sorted(off))} can't be split off. Give the splits as files of their own."
        )
    split_of: dict[int, str] = {}
    for done, split in enumerate(sorted(off, reverse=True)):  # validation first
        others = len(off) - done  # train and the splits that are still to come
        chosen = [k for k in free if k % 100 in BUCKETS[split]] or free[:1]
        split_of |= dict.fromkeys(chosen[: len(free) - others], split)
        free = [k for k in free if k not in split_of]
    rows: dict[str, list[int]] = {"train": [], **{split: [] for split in off}}
    for row, k in enumerate(keys):
        rows[split_of.get(k, "train")].append(row)
    return rows


def choose_evenly(num_rows: int, *, most: int) -> list[int]:
    """Returns so many row numbers, evenly spaced from the first on."""
    return [n * num_rows // most for n in range(most)]
