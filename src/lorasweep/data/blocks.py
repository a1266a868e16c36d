"""Splits of running text, whose examples are blocks of equal length. Uses `split` and `tokenise`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import StdlibConfig, TextConfig
from lorasweep.data.source import Document, Examples
from lorasweep.data.split import Batch, Split
from lorasweep.data.tokenise import end_token, tokenise_texts
from lorasweep.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSplit(Split):
    """A split of all its documents end to end, cut into blocks that overlap by one token."""

    tokens: Tensor
    """Token ids, (blocks, block_length + 1), int64. The last token of a block is the first token of the next block, so
    each token except the very first is predicted once. The last tokens, which do not fill a block, are left out. The
    tensor is a view: do not write to it."""
    documents: int
    bytes: int
    """Number of UTF-8 bytes of all texts."""
    bytes_per_token: float
    """Number of bytes divided by the number of tokens of the whole split; the end of a document counts as a token."""
    separator: int | None = None
    """Id of the token that ends a document, if tokens must not attend to earlier documents of their block
    (`data.separate_documents`); else None."""

    @functools.cached_property
    def lengths(self) -> Tensor:
        """The block length, for each block."""
        return torch.full((len(self.tokens),), self.tokens.shape[1] - 1)

    @functools.cached_property
    def weights(self) -> Tensor:
        """Number of scored tokens of each block: all its tokens are scored."""
        return self.lengths.float()

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns these blocks; the target of each token is the next token."""
        blocks = self.tokens[torch.tensor(indices)]  # (batch, block + 1)
        batch = {"input_ids": blocks[:, :-1].contiguous(), "targets": blocks[:, 1:].contiguous()}
        if self.separator is None:
            return batch
        return {**batch, "position_ids": positions_in_documents(batch["input_ids"], separator=self.separator)}

    def describe(self) -> dict[str, Any]:
        """Returns the split's entry in a run record."""
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
    texts = [document.text for document in examples.items]
    tokens = tokenise_texts(texts, tokenizer=tokenizer, fingerprint=examples.fingerprint)["input_ids"].values
    if len(tokens) <= config.block_length:
        raise ConfigError(
            f"`data.block_length` must be less than the {len(tokens)} tokens of the {examples.name} split of "
            f"`data={config.name}`, but got {config.block_length}. Use shorter blocks or more text."
        )
    blocks = cut_blocks(tokens, block_length=config.block_length)
    most = {"validation": config.max_validation_blocks, "test": config.max_test_blocks}.get(examples.name)
    if most is not None and most < len(blocks):
        blocks = blocks[torch.arange(most) * len(blocks) // most]  # evenly spaced
    size = sum(len(text.encode()) for text in texts)
    return BlockSplit(
        name=examples.name,
        notes=examples.notes,
        tokens=blocks,
        documents=len(texts),
        bytes=size,
        bytes_per_token=size / len(tokens),
        fingerprint=examples.fingerprint,
        separator=end_token(tokenizer) if config.separate_documents else None,
    )


def cut_blocks(tokens: Tensor, *, block_length: int) -> Tensor:
    """Returns a view of `tokens`, (tokens,), as blocks that overlap by one token, (blocks, block_length + 1)."""
    return tokens.unfold(0, block_length + 1, block_length)


def positions_in_documents(tokens: Tensor, *, separator: int) -> Tensor:
    """Returns the position of each token in its document, or in its block if the document began earlier.

    Shape (batch, block), int64. If a position is not the previous one plus 1, transformers starts a new sequence there
    and lets no token attend across the start.
    """
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = torch.where(tokens[:, :-1] == separator, places[:, 1:], 0)
    return places - starts.cummax(dim=1).values
