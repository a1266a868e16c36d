"""Splits of running text. Each example is a block of tokens, and all blocks have the same length."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import StdlibConfig, TextConfig
from lorasweep.data.source import Document, Examples
from lorasweep.data.split import Batch, Split
from lorasweep.data.tokenise import tokenise_documents
from lorasweep.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSplit(Split):
    """Documents joined end to end and cut into blocks that overlap by one token."""

    tokens: Tensor
    """Token ids, (blocks, block_length + 1), int64. The last token of a block is also the first token of the next
    block, so each token except the very first is predicted once. The tokens after the last full block are dropped.
    Do not write to this tensor: its blocks share memory."""
    documents: int
    """Number of documents."""
    bytes: int
    """Number of UTF-8 bytes of all texts."""
    bytes_per_token: float
    """Mean number of bytes per token in all documents; the end of a document counts as a token."""

    @functools.cached_property
    def lengths(self) -> Tensor:
        return torch.full((len(self.tokens),), self.tokens.shape[1] - 1)

    @functools.cached_property
    def weights(self) -> Tensor:
        return self.lengths.float()

    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns the blocks at these indices. The target at each position is the next token."""
        blocks = self.tokens[torch.tensor(indices)]  # (batch, block + 1)
        return {"input_ids": blocks[:, :-1].contiguous(), "targets": blocks[:, 1:].contiguous()}

    def describe(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "blocks": len(self.tokens),
            "fingerprint": self.fingerprint,
        }


def build_block_split(
    examples: Examples[Document], *, config: StdlibConfig | TextConfig, tokenizer: PreTrainedTokenizerBase
) -> BlockSplit:
    """Tokenises the documents of one split and cuts them into blocks.

    Raises:
        ConfigError: The split is shorter than one block, or the tokenizer has no token that ends a text.
    """
    documents = tokenise_documents(examples, tokenizer=tokenizer)
    tokens = documents.values
    if len(tokens) <= config.block_length:
        raise ConfigError(
            f"`data.block_length` must be less than the {len(tokens)} tokens of the {examples.name} split of "
            f"`data={config.name}`, but got {config.block_length}. Use shorter blocks or more text."
        )
    blocks = cut_blocks(tokens, block_length=config.block_length)
    # A block belongs to the document of the first token that it predicts. Its own first token is not predicted.
    first_predicted = torch.arange(len(blocks)) * config.block_length + 1
    owners = torch.searchsorted(documents.ends, first_predicted, right=True)
    limit = {"validation": config.max_validation_blocks, "test": config.max_test_blocks}.get(examples.name)
    if limit is not None and limit < len(blocks):
        chosen = choose_evenly(torch.bincount(owners, minlength=len(examples)).tolist(), limit=limit)
        blocks, owners = blocks[chosen], owners[chosen]
    owning = [examples.items[index] for index in owners.tolist()]
    num_bytes = sum(len(document.text.encode()) for document in examples.items)
    return BlockSplit(
        name=examples.name,
        notes=examples.notes,
        groups=tuple(document.group or document.name for document in owning),
        tokens=blocks,
        documents=len(examples),
        bytes=num_bytes,
        bytes_per_token=num_bytes / len(tokens),
        fingerprint=examples.fingerprint,
    )


def choose_evenly(counts: Sequence[int], *, limit: int) -> list[int]:
    """Returns the indices of `limit` blocks, spread as evenly over documents as their numbers of blocks allow.

    Args:
        counts: The number of blocks of each document, in the order of the blocks.
        limit: Number of blocks to choose, less than the sum of `counts`.
    """
    # Each round gives every document one block more, as long as it has one.
    shares, share = [0] * len(counts), 0
    while sum(shares) < limit:
        share += 1
        shares = [min(count, share) for count in counts]
    largest = [index for index, count in enumerate(shares) if count == share]
    surplus = sum(shares) - limit
    for n in range(surplus):  # the last round gives a block to some of the documents only, evenly spaced among them
        shares[largest[n * len(largest) // surplus]] -= 1
    starts = itertools.accumulate(counts, initial=0)
    return [
        start + n * count // share
        for start, count, share in zip(starts, counts, shares, strict=False)
        for n in range(share)
    ]


def cut_blocks(tokens: Int[Tensor, " tokens"], *, block_length: int) -> Int[Tensor, "blocks {block_length}+1"]:
    """Returns a view of the tokens as blocks that overlap by one token."""
    return tokens.unfold(0, block_length + 1, block_length)
