"""Checked examples of each split in plain Python. `read_source` reads them, `splits` tokenises them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

Role = Literal["system", "user", "assistant"]
Kind = Literal["documents", "single_label", "multi_label", "regression", "conversations"]
Label = int | float | list[int]
"""Index of the label's name; a number under regression; the rising indices of all labels under multi-label."""


class Document(NamedTuple):
    """A whole text, to be cut into blocks, and where it comes from."""

    name: str
    text: str


class LabelledText(NamedTuple):
    """A text, or a pair of texts, with the label to predict."""

    text: str
    pair: str | None
    label: Label


class Message(NamedTuple):
    """One message of a conversation."""

    role: Role
    content: str


Conversation = list[Message]
"""Messages, the last one the assistant's. A prompt is a user's message, its completion the assistant's."""

Example = TypeVar("Example")
"""A `Document`, `LabelledText` or `Conversation`."""


@dataclass(frozen=True, kw_only=True)
class Examples(Generic[Example]):
    """The examples of one split."""

    name: str
    """`train`, `validation` or `test`."""
    items: list[Example]
    fingerprint: str
    """16 hex digits over all examples in order."""
    notes: tuple[str, ...] = ()
    """Sentences on the split for the user; only of the test split, which is read last. Else `DataSource` has them."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.items)


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnExamples:
    """Examples of a data set of the user's own, which gives them when they are asked for."""

    name: str
    """`train`, `validation` or `test`."""
    dataset: Any
    """Has a length, and the same item at an index each time."""
    collate: Callable[[list[Any]], Any]
    """Makes a batch, a mapping of tensors, of items."""
    lengths: Tensor
    """Tokens of each example, (examples,), int64."""
    weights: Tensor
    """Scored items of each example, (examples,), float."""
    fingerprint: str
    """16 hex digits over all examples in order."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.lengths)


AnyExamples = Examples[Any] | OwnExamples


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSource:
    """A data set as it was read: its splits, and sentences about them."""

    kind: Kind
    label_names: tuple[str, ...] = ()
    """Names of the classes in the order of their indices; empty where there are none."""
    train: AnyExamples
    validation: AnyExamples
    test: Callable[[], AnyExamples]
    """Reads the test split at its first call and returns the same one afterwards; nothing of it is used before."""
    notes: tuple[str, ...] = ()
    """Sentences: which splits were taken from train and how, duplicates, the majority class and its score."""


def collect_examples(name: str, items: list[Example], notes: tuple[str, ...] = ()) -> Examples[Example]:
    """Returns the examples of a split with their fingerprint."""
    return Examples(name=name, items=items, fingerprint=fingerprint_examples(items), notes=notes)


def fingerprint_examples(items: Iterable[Example]) -> str:
    """Returns the first 16 hex digits of a SHA-256 that changes with any text, label or their order."""
    digest = hashlib.sha256()
    for text in (text for item in items for text in _texts_of(item)):
        data = text.encode()
        # The length keeps texts apart: ("ab", "c") is not ("a", "bc").
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _texts_of(item: Any) -> Iterator[str]:
    if isinstance(item, list):  # a conversation: the count keeps two conversations apart from one long one
        yield str(len(item))
        for message in item:
            yield from message
    else:
        yield from (value if isinstance(value, str) else repr(value) for value in item)
