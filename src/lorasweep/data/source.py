"""The examples of a data set: checked, but not yet tokenised."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from lorasweep.data.split import Split

Role = Literal["system", "user", "assistant"]
Kind = Literal["documents", "single_label", "regression", "conversations"]
Label = int | float
"""A class index; for regression a number."""


class Document(NamedTuple):
    """A whole text, which is later cut into blocks, and its name."""

    name: str
    text: str
    group: str | None = None
    """Value of the column `data.group`; None if each document is a group."""


class LabelledText(NamedTuple):
    """A text, or a pair of texts, with the label to predict."""

    text: str
    pair: str | None
    label: Label
    group: str | None = None
    """Value of the column `data.group`; None if each row is a group."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: Role
    content: str


class Conversation(NamedTuple):
    """Messages, the last one from the assistant. A prompt with its completion has two messages."""

    messages: list[Message]
    group: str | None = None
    """Value of the column `data.group`, or a hash of the prompt; None if each conversation is a group."""


Example = TypeVar("Example")
"""A `Document`, `LabelledText` or `Conversation`."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSource:
    """The splits of a data set, and notes for the user about them.

    A split is `Examples`, or a `Split` if the user's data module returns tensors.
    """

    kind: Kind
    label_names: tuple[str, ...] = ()
    """Names of the classes in the order of their indices; empty for data without classes."""
    train: Examples[Any] | Split
    validation: Examples[Any] | Split
    test: Callable[[], Examples[Any] | Split]
    """Returns the test split. The first call reads it, and later calls return the same object."""
    notes: tuple[str, ...] = ()
    """Notes for the user, for example the number of duplicates, or how a missing split was taken from train."""


def collect_examples(name: str, items: list[Example], notes: tuple[str, ...] = ()) -> Examples[Example]:
    """Returns the examples of a split with their fingerprint."""
    return Examples(name=name, items=items, fingerprint=fingerprint_examples(items), notes=notes)


def fingerprint_examples(items: Iterable[Example]) -> str:
    """Returns the first 16 hex digits of a SHA-256 over all texts and labels in order."""
    digest = hashlib.sha256()
    for text in (text for item in items for text in _list_texts(item)):
        data = text.encode()
        # The length keeps texts apart: ("ab", "c") is not ("a", "bc").
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _list_texts(item: Any) -> Iterator[str]:
    """Yields every text and label of an example, and a document's name, but not its group."""
    if isinstance(item, Conversation):
        yield str(len(item.messages))  # keeps two conversations apart from one long one
        for message in item.messages:
            yield from message
    elif isinstance(item, Document):
        yield from (item.name, item.text)
    else:
        values = (item.text, item.pair, item.label)
        yield from (value if isinstance(value, str) else repr(value) for value in values)
