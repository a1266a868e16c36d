"""The examples of a data set: checked and assigned to splits, but not yet tokenised.

Nothing is drawn at random. A split without a file of its own gets the examples of the training file whose content, or
group, has a hash in its range. So an example stays in its split when other examples are added or reordered. If there
are few documents, each is cut into the splits. Limits such as `data.max_train_examples` keep evenly spaced examples.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from lorasweep.config.data import LabelKind
from lorasweep.errors import ConfigError

MAX_NAMED_ROWS = 10
"""Maximum number of wrong rows that an error names."""


class AnyExample(Protocol):
    """An example of a task."""

    @property
    def group(self) -> str | None:
        """The value of the column `data.group`; None if each example is a group."""

    def list_texts(self) -> Iterator[str]:
        """Yields every text and label, which make the fingerprint of the data."""


T = TypeVar("T")
Example = TypeVar("Example", bound=AnyExample)
FIRST_BUCKETS: Mapping[str, int] = {"validation": 0, "test": 10}
"""The first of the hash buckets (0 to 99) of a split without a file of its own. Test comes last, so a larger test split
leaves validation as it is."""

ReadExamples = tuple[list[Example], list[str]]
"""The usable examples of a split, and notes for the user about them."""
SplitOff = Callable[[list[Example], Mapping[str, int]], tuple[dict[str, list[Example]], list[str]]]
"""Takes all training examples and the percentage of each missing split. Returns the examples of `train` and of each
missing split, and notes for the user."""


@dataclass(frozen=True, kw_only=True)
class Examples(Generic[Example]):
    """The examples of one split."""

    name: str
    """`train`, `validation` or `test`."""
    items: list[Example]
    fingerprint: str
    """First 16 hex digits of a SHA-256 over all examples in order."""
    notes: tuple[str, ...] = ()
    """Notes for the user about the test split. Notes about train and validation are in `DataSource.notes`."""

    def __len__(self) -> int:
        return len(self.items)

    def take(self, limit: int | None) -> Examples[Example]:
        """Returns `limit` evenly spaced examples, or all for None or a larger limit."""
        if limit is None or limit >= len(self):
            return self
        return collect_examples(self.name, choose_evenly(self.items, limit), self.notes)


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSource:
    """The checked examples of a data set in their splits."""

    label_kind: LabelKind | None = None
    """The kind of labels; None for examples without labels."""
    label_names: tuple[str, ...] = ()
    """Names of the classes in the order of their indices; empty for data without classes."""
    train: Examples[Any]
    validation: Examples[Any]
    test: Callable[[], Examples[Any]]
    """Returns the test split. The first call reads it, and later calls return the same object."""
    notes: tuple[str, ...] = ()
    """Notes for the user, for example the number of duplicates, or how a missing split was taken from train."""


def choose_evenly(items: Sequence[T], limit: int) -> list[T]:
    """Returns `limit` evenly spaced items of a longer sequence. `2 * limit` contains them too."""
    return [items[n * len(items) // limit] for n in range(limit)]


def collect_examples(name: str, items: list[Example], notes: tuple[str, ...] = ()) -> Examples[Example]:
    """Returns the examples of a split with their fingerprint."""
    digest = hashlib.sha256()
    for text in (text for item in items for text in item.list_texts()):
        data = text.encode()
        # The length keeps texts apart: ("ab", "c") is not ("a", "bc").
        digest.update(len(data).to_bytes(8, "little") + data)
    return Examples(name=name, items=items, fingerprint=digest.hexdigest()[:16], notes=notes)


def build_source(
    train: ReadExamples[Example],
    read: Callable[[str], ReadExamples[Example]],
    *,
    missing: Mapping[str, int],
    key: Callable[[Example], int],
    describe: Callable[[list[Example], list[Example]], list[str]],
    label_kind: LabelKind | None = None,
    label_names: tuple[str, ...] = (),
    shared: str = "text",
    max_examples: Mapping[str, int | None] = MappingProxyType({}),
    split_off: SplitOff[Example] | None = None,
) -> DataSource:
    """Returns the splits of a data set. The test split is read at the first call of `DataSource.test`.

    `train` has the whole training file, and `read` reads another split. `missing` has the percentage of the training
    examples that each split without a source gets; `split_off` takes them, or by default `key` decides. Examples with
    the same key count as duplicates; `shared` names what they share, for notes. `describe` returns notes about the
    training and validation examples.
    """
    parts: dict[str, list[Example]] = {"train": train[0]}
    notes = list(train[1])
    if missing:
        parts, split_notes = (split_off or functools.partial(_split_by_key, key=key, shared=shared))(train[0], missing)
        notes += split_notes

    def load(name: str) -> ReadExamples[Example]:
        items, notes = (parts[name], []) if name in parts else read(name)
        limit = max_examples.get(name)
        if limit is None or limit >= len(items):
            return items, notes
        return choose_evenly(items, limit), [*notes, f"{name} uses {limit} of {len(items)} examples, evenly spaced."]

    (train_items, train_notes), (validation_items, validation_notes) = load("train"), load("validation")
    keys = {"train": frozenset(map(key, train_items)), "validation": frozenset(map(key, validation_items))}

    def count_duplicates(name: str, items: list[Example], *, others: Iterable[str]) -> Iterator[str]:
        for other in others:
            # splits that are taken from one file have no duplicates of each other
            duplicates = 0 if {name, other} <= {"train", *missing} else sum(key(item) in keys[other] for item in items)
            if duplicates:
                yield f"{duplicates} of {len(items)} examples of {name}: their {shared} is in {other} too."

    @functools.cache
    def test() -> Examples[Example]:
        items, notes = load("test")
        return collect_examples("test", items, (*notes, *count_duplicates("test", items, others=keys)))

    repeated = len(train_items) - len(keys["train"])
    repeats = [f"{repeated} of {len(train_items)} examples of train: their {shared} is that of another one."]
    return DataSource(
        label_kind=label_kind,
        label_names=label_names,
        train=collect_examples("train", train_items),
        validation=collect_examples("validation", validation_items),
        test=test,
        notes=(
            *notes,
            *train_notes,
            *validation_notes,
            *(repeats if repeated else ()),
            *count_duplicates("validation", validation_items, others=["train"]),
            *describe(train_items, validation_items),
        ),
    )


def _split_by_key(
    items: list[Example], missing: Mapping[str, int], *, key: Callable[[Example], int], shared: str
) -> tuple[dict[str, list[Example]], list[str]]:
    assigned = assign_splits([key(item) for item in items], missing=missing)
    notes = [
        f"{split} is split off from train: {len(assigned[split])} of {len(items)} examples, whose {shared} has a "
        f"hash of {(first := FIRST_BUCKETS[split])} to {first + percent - 1} modulo 100. Examples with the same "
        f"{shared} stay together."
        for split, percent in missing.items()
    ]
    return {split: [items[index] for index in indices] for split, indices in assigned.items()}, notes


def content_key(texts: Iterable[str]) -> int:
    """Returns a 64-bit hash of texts that ignores case and white space."""
    plain = "\n".join([" ".join(text.split()).casefold() for text in texts])  # the texts have no line breaks by now
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")


def assign_splits(keys: Sequence[int], *, missing: Mapping[str, int]) -> dict[str, list[int]]:
    """Returns the indices of the examples in `train` and in each missing split, none of which is empty.

    A split gets its percentage of the buckets (the content key modulo 100) from its first one on, so equal keys stay
    together. Raises ConfigError if there are fewer different examples than splits.
    """
    free = sorted(set(keys))
    if len(free) <= len(missing):
        raise ConfigError(
            f"`data.train` must have at least {len(missing) + 1} different examples to take {' and '.join(missing)} "
            f"from, but has {len(free)}. Give each split its own file."
        )
    split_of_key: dict[int, str] = {}
    for done, split in enumerate(sorted(missing, reverse=True)):  # validation first
        # If no key is in the buckets, the smallest key is taken. One key must be left for each later split and train.
        num_others = len(missing) - done
        chosen = [key for key in free if 0 <= key % 100 - FIRST_BUCKETS[split] < missing[split]] or free[:1]
        split_of_key |= dict.fromkeys(chosen[: len(free) - num_others], split)
        free = [key for key in free if key not in split_of_key]
    indices: dict[str, list[int]] = {"train": [], **{split: [] for split in missing}}
    for index, key in enumerate(keys):
        indices[split_of_key.get(key, "train")].append(index)
    return indices
