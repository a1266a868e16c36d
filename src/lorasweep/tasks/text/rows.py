"""Cuts documents into blocks of tokens, which are rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from lorasweep.data.rows import Ragged, Rows
from lorasweep.data.source import DataSource, Examples, choose_evenly
from lorasweep.data.tokenise import Columns, cache_key, get_end_token, map_cached, tokenise_plain
from lorasweep.errors import ConfigError
from lorasweep.tasks.text.read import Document
from lorasweep.tasks.text.settings import BlockSettings


def build_blocks(
    examples: Examples[Document],
    *,
    config: BlockSettings,
    tokenizer: PreTrainedTokenizerBase,
    source: DataSource | None = None,
) -> Rows:
    """Tokenises the documents of one split, joins them end to end, and cuts them into blocks of equal length.

    The targets of a block are its tokens and the first one of the next block, so each token except the very first is
    predicted once. The tokens after the last full block are dropped. Raises ConfigError if there is no full block.
    """
    if examples.name == "train":
        examples = examples.take(config.max_train_documents)
    documents, length = tokenise_documents(examples, tokenizer=tokenizer), config.block_length
    tokens = documents.values
    if len(tokens) <= length:
        raise ConfigError(
            f"`data.block_length` must be less than the {len(tokens)} tokens of the {examples.name} split of "
            f"`data={config.name}`, but got {length}. Use shorter blocks or more text."
        )
    starts = torch.arange((len(tokens) - 1) // length) * length
    # A block belongs to the document of the first token that it predicts. Its own first token is not predicted.
    owners = torch.searchsorted(documents.starts + documents.lengths, starts + 1, right=True)
    limit = {"validation": config.max_validation_blocks, "test": config.max_test_blocks}.get(examples.name)
    if limit is not None and limit < len(starts):
        chosen = choose_evenly(range(len(starts)), limit)
        starts, owners = starts[chosen], owners[chosen]
    owning = [examples.items[index] for index in owners.tolist()]
    num_bytes = sum(len(document.text.encode()) for document in examples.items)
    lengths = torch.full_like(starts, length)
    return Rows(
        name=examples.name,
        fingerprint=examples.fingerprint,
        notes=examples.notes,
        groups=tuple(document.group or document.name for document in owning),
        sequences={
            "input_ids": Ragged(values=tokens, starts=starts, lengths=lengths),
            "targets": Ragged(values=tokens, starts=starts + 1, lengths=lengths),
        },
        weights=lengths.float(),
        bytes_per_token=num_bytes / len(tokens),
        facts={
            "documents": len(examples),
            "bytes": num_bytes,
            "blocks": len(starts),
            "fingerprint": examples.fingerprint,
        },
    )


def tokenise_documents(examples: Examples[Document], *, tokenizer: PreTrainedTokenizerBase) -> Ragged:
    """Returns the token ids of whole documents, each followed by the tokenizer's end-of-text token."""
    end = get_end_token(tokenizer)

    def tokenise(documents: Sequence[Document]) -> Columns:
        ids = tokenise_plain([document.text for document in documents], tokenizer)
        return {"input_ids": [[*document, end] for document in ids]}

    return map_cached(examples, tokenise, key=cache_key(tokenizer, examples.fingerprint, form="text"))["input_ids"]
