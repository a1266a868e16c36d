"""Splits whose rows are blocks of running text. Comes after `split` and `tokenise`, beside `examples`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.data.source import Documents
from lorasweep.data.split import Batch, Split
from lorasweep.data.tokenise import end_token, tokenise_texts
from lorasweep.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSplit(Split):
    """A text as one row of tokens, cut into blocks that overlap by one token."""

    tokens: Tensor
    """(blocks, block_length + 1), int64. A block's last token is the next one's first, so each token but the very
    first is predicted once; what does not fill a block at the end is left out. A view: not to be written to."""
    documents: int
    bytes: int
    """UTF-8 bytes of all texts."""
    bytes_per_token: float
    """Bytes over tokens of the whole split, the ends of documents counted as tokens."""
    separator: int | None = None
    """The token after which another document begins, to which no earlier token is shown; None shows all of a block."""

    @functools.cached_property
    def lengths(self) -> Tensor:
        """The block length, for each block."""
        return torch.full((len(self.tokens),), self.tokens.shape[1] - 1)

    @functools.cached_property
    def weights(self) -> Tensor:
        """The scored tokens of each block: all of them."""
        return self.lengths.float()

    def batch(self, indices: Sequence[int], *, slots: int = 1) -> Batch:
        """Returns these blocks; each token's target is the next one."""
        blocks = self.tokens[torch.tensor(indices)]  # (batch, block + 1)
        batch = {"input_ids": blocks[:, :-1].contiguous(), "targets": blocks[:, 1:].contiguous()}
        if self.separator is None:
            return batch
        return {**batch, "position_ids": positions_in_documents(batch["input_ids"], separator=self.separator)}

    def describe(self) -> dict[str, Any]:
        """Returns what a run record keeps of the split."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "blocks": len(self.tokens),
            "fingerprint": self.fingerprint,
        }


def build_block_split(
    rows: Documents,
    *,
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    max_blocks: int | None,
    separate: bool,
) -> BlockSplit:
    """Tokenises and cuts one split.

    Args:
        rows: Its documents.
        data: `data.name`, for messages.
        tokenizer: The model's.
        block_length: Tokens per block.
        max_blocks: Use at most so many, evenly spaced.
        separate: Whether no token sees an earlier document.

    Raises:
        ConfigError: It is empty or shorter than one block, or the tokenizer has no token that ends a text.
    """
    if not rows.documents:
        raise ConfigError(
            f"the {rows.name} split of `data={data}` must not be empty, but has no document. Use other data."
        )
    texts = [document.text for document in rows.documents]
    row = tokenise_texts(texts, tokenizer=tokenizer, fingerprint=rows.fingerprint)["input_ids"].values
    if len(row) <= block_length:
        raise ConfigError(
            f"`data.block_length` must be less than the {len(row)} tokens of the {rows.name} split of `data={data}`, "
            f"but got {block_length!r}. Use shorter blocks or more text."
        )
    size = sum(len(text.encode()) for text in texts)
    return BlockSplit(
        name=rows.name,
        notes=rows.notes,
        tokens=choose_evenly(cut_blocks(row, block_length=block_length), most=max_blocks),
        documents=len(texts),
        bytes=size,
        bytes_per_token=size / len(row),
        fingerprint=rows.fingerprint,
        separator=end_token(tokenizer) if separate else None,
    )


def cut_blocks(row: Tensor, *, block_length: int) -> Tensor:
    """Returns a view of a row of tokens as overlapping blocks, (blocks, block_length + 1)."""
    return row.unfold(0, block_length + 1, block_length)


def choose_evenly(blocks: Tensor, *, most: int | None) -> Tensor:
    """Returns at most so many blocks, evenly spaced from the first on; all of them for None."""
    if most is None or most >= len(blocks):
        return blocks
    return blocks[torch.arange(most) * len(blocks) // most]


def positions_in_documents(tokens: Tensor, *, separator: int) -> Tensor:
    """Returns how far each token is from the start of its document or block, (batch, block), int64.

    Transformers takes a position that does not follow its neighbour's for the start of another sequence, and lets no
    token attend across it.
    """
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = torch.where(tokens[:, :-1] == separator, places[:, 1:], 0)
    return places - starts.cummax(dim=1).values
