"""Turns conversations into rows, in which only tokens of the assistant are scored."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.data.rows import IGNORED, Answers, Ragged, Rows
from lorasweep.data.source import DataSource, Examples
from lorasweep.data.tokenise import find_pad_token
from lorasweep.errors import ConfigError
from lorasweep.tasks.chat.read import Conversation
from lorasweep.tasks.chat.settings import ConversationSettings
from lorasweep.tasks.chat.tokenise import describe_chat_format, tokenise_chats


def build_conversations(
    examples: Examples[Conversation],
    *,
    config: ConversationSettings,
    tokenizer: PreTrainedTokenizerBase,
    source: DataSource | None = None,
    row_names: tuple[str, ...] = ("",),
) -> Rows:
    """Returns the rows of one split.

    With several `row_names`, as many conversations in a row, each with one scored answer, are one example.

    An example without a scored token in one of its rows, because its answer was cut off, is left out and counted.
    Raises ConfigError if all are, and as `tokenise_chats`.
    """
    columns, size = tokenise_chats(examples, config=config, tokenizer=tokenizer), len(row_names)
    targets, is_cut = columns["targets"], columns["full_length"].values > config.max_length
    num_scored = count_scored(targets)
    is_kept = (num_scored > 0).view(-1, size).all(1)
    kept = is_kept.repeat_interleave(size).nonzero().flatten()
    if not len(kept):
        raise ConfigError(
            f"the {examples.name} split of `data={config.name}` must have a token to predict, but all its answers are "
            "cut off. Raise `data.max_length`, or use other data."
        )
    # an answer that was cut off, or is not scored at its end, is no reference for generated ones
    last_targets = targets.values[targets.starts + targets.lengths - 1]
    is_whole = ~is_cut & (last_targets != IGNORED)
    starts = columns["answer_start"].values.where(is_whole, 0)[kept].view(-1, size)[:, 0]
    items = columns["row"].values[kept].view(-1, size)[:, 0].tolist()  # the first conversation of each example
    texts = [message.content for conversation in examples.items for message in conversation.messages]
    num_scored = num_scored[kept]
    facts = {
        "examples": len(items),
        "bytes": sum(len(text.encode()) for text in texts),
        "truncated": int(is_cut.view(-1, size).any(1).sum()),
        "left_out": len(is_kept) - len(items),
        "fingerprint": examples.fingerprint,
        "conversations": len(examples),
        **describe_chat_format(config, tokenizer),
    }
    notes = list(examples.notes)
    if examples.name == "train" and len(kept) > size * len(examples):
        notes.append(
            f"{len(examples)} conversations of train are {len(kept)} examples, because the chat template rewrites "
            "earlier turns or ends no answer: each answer follows the prompt that a server gives."
        )
    return Rows(
        name=examples.name,
        fingerprint=examples.fingerprint,
        notes=tuple(notes),
        groups=tuple(examples.items[item].group or str(item) for item in items),
        sequences={"input_ids": columns["input_ids"].select(kept), "targets": targets.select(kept)},
        weights=num_scored.float() if size == 1 else torch.ones(len(items)),
        bytes_per_token=int(columns["scored_bytes"].values.sum()) / max(float(num_scored.sum()), 1.0),
        row_names=row_names,
        pad_token=find_pad_token(tokenizer),
        answers=Answers(starts=starts, table_rows=tuple(examples.items[item].row for item in items)),
        facts=facts,
    )


def count_scored(targets: Ragged) -> Tensor:
    """Returns the number of scored tokens of each row, (rows,)."""
    counts = torch.cat([targets.values.new_zeros(1), (targets.values != IGNORED).cumsum(0)])
    return counts[targets.starts + targets.lengths] - counts[targets.starts]
