"""A data set's parts as token blocks, made once per worker and shared by all its runs.

Comes after `sources` (documents) and before `batching` and `module` (batches).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import DataConfig, StdlibConfig
from lorasweep.data.rows import fingerprint_documents
from lorasweep.data.sources import SOURCES
from lorasweep.data.stdlib import Document
from lorasweep.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One part of a data set, cut into blocks that overlap by one token."""

    name: str
    """`train`, `validation` or `test`."""
    tokens: Tensor
    """(blocks, block_length + 1), int64. A block's last token is the next one's first, so each token but the very
    first is predicted once; what does not fill a block at the end is left out. A view: not to be written to."""
    documents: int
    bytes: int
    """UTF-8 bytes of all texts."""
    bytes_per_token: float
    """Bytes over tokens of the whole part, the ends of documents counted as tokens."""
    fingerprint: str
    """SHA-256 over names and texts in order, its first 16 hex digits."""

    def describe(self) -> dict[str, Any]:
        """Returns what a run record keeps of the part."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "blocks": len(self.tokens),
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class DataParts:
    """The parts of a data set."""

    train: Part
    validation: Part
    test: Callable[[], Part]
    """Reads the test part at its first call and returns the same one afterwards; nothing of it is read before."""


def load_parts(config: DataConfig, *, tokenizer: PreTrainedTokenizerBase) -> DataParts:
    """Reads, tokenises and cuts the training and validation part; the test part waits until it is called for.

    Raises:
        ConfigError: A part is empty or shorter than one block, or the tokenizer has no token that ends a text.
            For the test part, when it is called for.
    """
    if not isinstance(config, StdlibConfig):
        raise ConfigError(f"`data` must be stdlib_docs or stdlib_code to be cut into blocks, but got {config.name!r}.")
    load = functools.partial(load_part, config, tokenizer=tokenizer)
    return DataParts(
        train=load("train", max_blocks=None),
        validation=load("validation", max_blocks=config.max_validation_blocks),
        test=functools.cache(functools.partial(load, "test", max_blocks=config.max_test_blocks)),
    )


def load_part(config: StdlibConfig, name: str, *, tokenizer: PreTrainedTokenizerBase, max_blocks: int | None) -> Part:
    """Reads, tokenises and cuts one part.

    Raises:
        ConfigError: It is empty or shorter than one block, or the tokenizer has no token that ends a text.
    """
    documents = SOURCES[config.name](name)
    if not documents:
        raise ConfigError(
            f"the {name} part of `data={config.name}` must not be empty, but has no document. Use other data."
        )
    row = tokenise(documents, tokenizer=tokenizer)
    if len(row) <= config.block_length:
        raise ConfigError(
            f"`data.block_length` must be less than the {len(row)} tokens of the {name} part of `data={config.name}`, "
            f"but got {config.block_length!r}. Use shorter blocks or more text."
        )
    size = sum(len(document.text.encode()) for document in documents)
    return Part(
        name=name,
        tokens=choose_evenly(cut_blocks(row, block_length=config.block_length), most=max_blocks),
        documents=len(documents),
        bytes=size,
        bytes_per_token=size / len(row),
        fingerprint=fingerprint_documents(documents),
    )


def tokenise(documents: Sequence[Document], *, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Returns all documents as one row of token ids (tokens,), each followed by the tokenizer's end-of-text token.

    A text that spells out a special token (`<|endoftext|>`) is text and becomes ordinary tokens.

    Raises:
        ConfigError: The tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError(
            "`model.path` must have a tokenizer with an end-of-text token, but has none. Use another model."
        )
    rows = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # a document longer than the model's context is expected: it is cut into blocks
    )["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable((*row, end) for row in rows)), dtype=torch.int64)


def cut_blocks(row: Tensor, *, block_length: int) -> Tensor:
    """Returns a view of a row of tokens as overlapping blocks, (blocks, block_length + 1)."""
    return row.unfold(0, block_length + 1, block_length)


def choose_evenly(blocks: Tensor, *, most: int | None) -> Tensor:
    """Returns at most so many blocks, evenly spaced from the first on; all of them for None."""
    if most is None or most >= len(blocks):
        return blocks
    return blocks[torch.arange(most) * len(blocks) // most]
