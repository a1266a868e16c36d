"""From checked examples to a `DataSource`: takes missing splits from train, limits sizes, counts duplicates.

Nothing is drawn: an example's split depends on its own content, so it does not move when others are added or reordered.
`labelled`, `conversations` and `documents` call `build_source`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic

from lorasweep.data.source import DataSource, Example, Examples, Kind, collect_examples
from lorasweep.errors import ConfigError

BUCKETS: Mapping[str, range] = {"validation": range(10), "test": range(10, 20)}
"""Hash buckets, out of 100, whose examples go to a split that the data set lacks: a tenth for each split."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checked(Generic[Example]):
    """Examples of one split that can be used."""

    items: list[Example]
    keys: list[int]
    """Content key of each example: those with the same key stay in one split, and count as duplicates."""
    notes: tuple[str, ...] = ()
    """Sentences on what was left out."""

    def take(self, indices: Sequence[int], *notes: str) -> Checked[Example]:
        """Returns some of the examples, with sentences on why these."""
        return Checked(
            items=[self.items[n] for n in indices], keys=[self.keys[n] for n in indices], notes=(*self.notes, *notes)
        )


SplitOff = Callable[[Checked[Example], Sequence[str]], Mapping[str, Checked[Example]]]
"""Takes the training file and the names of the missing splits, returns `train` and those splits."""


def build_source(
    train: Checked[Example],
    read: Callable[[str], Checked[Example]],
    *,
    kind: Kind,
    given: Collection[str],
    describe: Callable[[Checked[Example], Checked[Example]], list[str]],
    label_names: tuple[str, ...] = (),
    same: str = "text",
    max_examples: Mapping[str, int | None] | None = None,
    split_off: SplitOff[Example] | None = None,
) -> DataSource:
    """Returns the splits of a data set; the test split is read when it is called for.

    Args:
        train: The whole training file.
        read: Reads a split that is given.
        kind: What the examples are.
        given: The splits that the settings name; the others are taken from train.
        describe: Returns sentences on the training and validation split.
        label_names: Names of the classes.
        same: What examples with the same content key share, for sentences.
        max_examples: Maximum of examples by split.
        split_off: Takes missing splits from train; by content keys if None.

    Raises:
        ConfigError: A split can't be used, or there is too little to split off. For the test split, when it is called
            for.
    """
    missing = [split for split in ("validation", "test") if split not in given]
    take_missing = split_off or functools.partial(_split_by_key, same=same)
    splits = take_missing(train, missing) if missing else {"train": train}

    def load(name: str) -> Checked[Example]:
        split = splits.get(name) or read(name)
        most, size = (max_examples or {}).get(name), len(split.items)
        if most is None or most >= size:
            return split
        return split.take(choose_evenly(size, most=most), f"{name} uses {most} of {size} examples, evenly spaced.")

    trained, validation = load("train"), load("validation")
    seen = frozenset(trained.keys)

    def count_duplicates(name: str, split: Checked[Example]) -> list[str]:
        if name in missing:
            return []  # it was taken from train by content key, so there are none
        shared = sum(key in seen for key in split.keys)
        return [f"{shared} of {len(split.keys)} examples of {name} have the {same} of an example of train."]

    @functools.cache
    def test() -> Examples[Example]:
        split = load("test")
        return collect_examples("test", split.items, (*split.notes, *count_duplicates("test", split)))

    repeated = len(trained.keys) - len(seen)
    return DataSource(
        kind=kind,
        label_names=label_names,
        train=collect_examples("train", trained.items),
        validation=collect_examples("validation", validation.items),
        test=test,
        notes=(
            *trained.notes,
            *validation.notes,
            f"{repeated} of {len(trained.keys)} examples of train repeat the {same} of another one.",
            *count_duplicates("validation", validation),
            *describe(trained, validation),
        ),
    )


def content_key(texts: Iterable[str]) -> int:
    """Returns a number of 64 bits that texts share if they are equal apart from case and white space."""
    plain = "\n".join([" ".join(text.split()).casefold() for text in texts])  # no text has a line break by now
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")


def _split_by_key(train: Checked[Example], missing: Sequence[str], *, same: str) -> Mapping[str, Checked[Example]]:
    assigned = assign_splits(train.keys, missing=missing)
    notes = [
        f"{split} is split off from train: {len(assigned[split])} of {len(train.items)} examples, whose {same} has a "
        f"hash of {BUCKETS[split][0]} to {BUCKETS[split][-1]} modulo 100. Examples with the same {same} stay together."
        for split in missing
    ]
    plain = replace(train, notes=())
    return {
        split: train.take(indices, *notes) if split == "train" else plain.take(indices)
        for split, indices in assigned.items()
    }


def assign_splits(keys: Sequence[int], *, missing: Collection[str]) -> dict[str, list[int]]:
    """Assigns examples to `train` and to each missing split; examples with the same key stay together.

    A split gets the examples whose key modulo 100 is in its `BUCKETS`; if there is none, those of the smallest free
    key. The largest keys stay free where nothing would be left for another split. So no split is empty.

    Args:
        keys: Content key of each example.
        missing: `validation`, `test` or both.

    Raises:
        ConfigError: There are fewer different examples than splits.
    """
    free = sorted(set(keys))
    if len(free) <= len(missing):
        raise ConfigError(
            f"`data.train` must have at least {len(missing) + 1} different examples to take {' and '.join(missing)} "
            f"from, but has {len(free)}. Give the splits as files of their own."
        )
    split_of: dict[int, str] = {}
    for done, split in enumerate(sorted(missing, reverse=True)):  # validation first
        others = len(missing) - done  # train and the splits that are still to come
        chosen = [key for key in free if key % 100 in BUCKETS[split]] or free[:1]
        split_of |= dict.fromkeys(chosen[: len(free) - others], split)
        free = [key for key in free if key not in split_of]
    indices: dict[str, list[int]] = {"train": [], **{split: [] for split in missing}}
    for index, key in enumerate(keys):
        indices[split_of.get(key, "train")].append(index)
    return indices


def choose_evenly(size: int, *, most: int) -> list[int]:
    """Returns `most` indices below `size`, evenly spaced from 0 on."""
    return [n * size // most for n in range(most)]
