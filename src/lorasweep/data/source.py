"""What reading gives: checked rows of plain Python, by split. `sources` makes them, `splits` tokenises them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lorasweep.data.stdlib import Document

Role = Literal["system", "user", "assistant"]
Kind = Literal["documents", "single_label", "multi_label", "regression", "conversations"]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Whole texts, to be cut into blocks."""

    name: str
    """`train`, `validation` or `test`."""
    documents: list[Document]
    fingerprint: str
    """16 hex digits over names and texts in order."""
    notes: tuple[str, ...] = ()
    """Sentences on what only this split could tell; of the test split, which is read last."""

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.documents)


@dataclass(frozen=True, kw_only=True)
class LabelledExamples:
    """Texts, or pairs of texts, each with what is to be predicted."""

    name: str
    """`train`, `validation` or `test`."""
    texts: list[str]
    pairs: list[str] | None
    """The second text of each row, as many as texts."""
    labels: list[int] | list[float] | list[list[int]]
    """Index of the label's name; a number under regression; the rising indices of all labels under multi-label."""
    fingerprint: str
    """16 hex digits over texts, pairs and labels in order."""
    notes: tuple[str, ...] = ()
    """Sentences on what only this split could tell; of the test split, which is read last."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.texts)


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one side says."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Conversations that end with the assistant; a prompt is a user's message, its completion the assistant's."""

    name: str
    """`train`, `validation` or `test`."""
    conversations: list[list[Message]]
    fingerprint: str
    """16 hex digits over roles and contents in order."""
    notes: tuple[str, ...] = ()
    """Sentences on what only this split could tell; of the test split, which is read last."""

    def __len__(self) -> int:
        """Returns the number of conversations."""
        return len(self.conversations)


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnExamples:
    """Rows of a data set of the user's own, which gives them when they are asked for."""

    name: str
    """`train`, `validation` or `test`."""
    dataset: Any
    """Has a length, and the same item at an index each time."""
    collate: Callable[[list[Any]], Any]
    """Makes a batch, a mapping of tensors, of items."""
    lengths: Tensor
    """Tokens of each row, (rows,), int64."""
    weights: Tensor
    """Scored items of each row, (rows,), float."""
    fingerprint: str
    """16 hex digits over all rows in order."""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.lengths)


Rows = Documents | LabelledExamples | Conversations | OwnExamples


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSource:
    """A data set as it was read: its splits and what there is to say about them."""

    kind: Kind
    label_names: tuple[str, ...]
    """Names of the classes in the order of their indices; empty where there are none."""
    train: Rows
    validation: Rows
    test: Callable[[], Rows]
    """Reads the test split at its first call and returns the same one afterwards; nothing of it is used before."""
    notes: tuple[str, ...]
    """Sentences: what was split off and how, duplicates, the majority class and its score, rows left out."""


def fingerprint_documents(documents: Sequence[Document]) -> str:
    """Returns 16 hex digits that change with any name, text or their order."""
    return fingerprint_texts(text for document in documents for text in (document.name, document.text))


def fingerprint_labelled(
    texts: Sequence[str], pairs: Sequence[str] | None, labels: Sequence[int] | Sequence[float] | Sequence[list[int]]
) -> str:
    """Returns 16 hex digits that change with any text, pair, label or their order."""
    seconds = pairs if pairs is not None else [""] * len(texts)
    rows = zip(texts, seconds, labels, strict=True)
    return fingerprint_texts(each for text, pair, label in rows for each in (text, pair, repr(label)))


def fingerprint_conversations(conversations: Sequence[Sequence[Message]]) -> str:
    """Returns 16 hex digits that change with any role, content or their order."""
    return fingerprint_texts(
        each
        for messages in conversations
        for each in (str(len(messages)), *(each for message in messages for each in (message.role, message.content)))
    )


def fingerprint_texts(texts: Iterable[str]) -> str:
    """Returns the first 16 hex digits of the SHA-256 over texts, each with its length before it."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # with its length, so that no text can move over
    return digest.hexdigest()[:16]
