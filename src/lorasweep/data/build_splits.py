"""Tokenises the splits of a data set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import (
    ChatConfig,
    DataConfig,
    PreferencesConfig,
    RowSettings,
    StdlibConfig,
    TableConfig,
    TextConfig,
)
from lorasweep.config.run import ModelKind
from lorasweep.data.source import Conversation, DataSource, Document, Examples, LabelledText, Preference
from lorasweep.data.split import (
    IGNORED,
    BlockSplit,
    CompletionSplit,
    LabelledSplit,
    PreferenceSplit,
    Ragged,
    Split,
    choose_evenly,
    cut_blocks,
)
from lorasweep.data.tokenise import describe_chat_format, tokenise_chats, tokenise_documents, tokenise_labelled
from lorasweep.errors import ConfigError

MODEL_KINDS: Mapping[str, ModelKind] = {
    **dict.fromkeys(("documents", "conversations", "preferences"), "causal_lm"),
    **dict.fromkeys(("single_label", "regression"), "classifier"),
}
"""For each kind of data: the kind of model that can learn from it."""


class TokenisedSplits(NamedTuple):
    """The splits of a data set, and notes for the user on how they were built."""

    train: Split
    validation: Split
    test: Callable[[], Split]
    """Returns the test split. The first call reads and tokenises it, and later calls return the same object."""
    notes: tuple[str, ...]


def build_splits(
    config: DataConfig,
    *,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    model_kind: ModelKind,
) -> TokenisedSplits:
    """Tokenises the training and validation split at once, and the test split at its first use.

    Raises ConfigError if the model can't learn from this kind of data, a split has nothing to predict, or the tokenizer
    has no end-of-text token; for the test split at its first use.
    """
    if model_kind != (wanted := MODEL_KINDS[source.kind]):
        raise ConfigError(
            f"`model.kind` must be {wanted} for `data={config.name}`, but got {model_kind!r}. Use `model={wanted}`, or "
            "other data."
        )

    def build(examples: Any) -> Split:
        if isinstance(config, TableConfig):
            return _build_labelled(examples, config=config, source=source, tokenizer=tokenizer)
        if isinstance(config, ChatConfig):
            return _build_chats(examples, config=config, tokenizer=tokenizer)
        if isinstance(config, PreferencesConfig):
            return _build_preferences(examples, config=config, tokenizer=tokenizer)
        assert isinstance(config, StdlibConfig | TextConfig)
        return build_block_split(examples, config=config, tokenizer=tokenizer)

    def build_test() -> Split:
        split = build(source.test())
        return replace(split, notes=(*split.notes, *describe_cut(split)))

    train, validation = build(source.train), build(source.validation)
    cut = (*describe_cut(train), *describe_cut(validation))
    return TokenisedSplits(
        train, validation, functools.cache(build_test), (*source.notes, *cut, *describe_template(train))
    )


def describe_cut(split: Split) -> list[str]:
    """Returns a sentence on examples that were cut off; none if there are none."""
    rows = split.sequences
    if rows is None or not rows.truncated:
        return []
    what, lack = ("examples", "have no answer left") if rows is split else ("answers", "pairs lack an answer then")
    left_out = rows.facts.get("left_out", 0)
    cut = f"{rows.truncated} {what} of {split.name} are longer than `data.max_length`, so their end is cut off"
    return [cut + (f"; {left_out} {lack} and are not used." if left_out else ".")]


def describe_template(split: Split) -> list[str]:
    """Returns sentences on how a chat template changed conversations."""
    rows = split.sequences
    if rows is None:
        return []
    facts = {"conversations": len(rows), "without_reasoning": 0, "after_added_end": 0, **rows.facts}
    # most of the examples that begin inside a conversation
    is_end = 2 * facts["after_added_end"] > len(rows) - facts["conversations"]
    cause = (
        "ends no answer with a special token, so the end-of-text token is added" if is_end else "rewrites earlier turns"
    )
    rewritten = (
        f"{facts['conversations']} conversations of {split.name} are {len(rows)} examples, because the chat template "
        f"{cause}: each answer follows the prompt that a server gives."
    )
    without = f"{facts['without_reasoning']} examples of {split.name} lack reasoning: the template leaves it out."
    chosen = {rewritten: len(rows) > facts["conversations"], without: facts["without_reasoning"]}
    return [note for note, applies in chosen.items() if applies]


def build_block_split(
    examples: Examples[Document], *, config: StdlibConfig | TextConfig, tokenizer: PreTrainedTokenizerBase
) -> BlockSplit:
    """Tokenises the documents of one split and cuts them into blocks. Raises ConfigError if they fill no block."""
    if examples.name == "train":
        examples = examples.take(config.max_train_documents)
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


def _build_labelled(
    examples: Examples[LabelledText], *, config: TableConfig, source: DataSource, tokenizer: PreTrainedTokenizerBase
) -> LabelledSplit:
    columns = tokenise_labelled(examples, tokenizer=tokenizer, max_length=config.max_length)
    is_regression = source.kind == "regression"
    dtype = torch.float32 if is_regression else torch.int64
    labels = torch.tensor([example.label for example in examples.items], dtype=dtype)
    class_weights = None
    if is_regression and config.class_weights != "none":
        raise ConfigError(
            f"`data.class_weights` must be none unless each example has one class, but got {config.class_weights!r}."
        )
    counts = [] if is_regression else labels.bincount(minlength=len(source.label_names)).tolist()
    if config.class_weights == "balanced" and examples.name == "train":
        # n / (classes · count), as scikit-learn balances them. A class without examples counts as one example.
        class_weights = len(examples) / (len(counts) * torch.tensor(counts).clamp(min=1).float())
    texts = [text for example in examples.items for text in (example.text, example.pair or "")]
    return LabelledSplit(
        **_shared_fields(examples, columns, texts=texts, config=config, tokenizer=tokenizer),
        token_types=columns.get("token_type_ids"),
        labels=labels,
        class_weights=class_weights,
        facts={"labels": dict(zip(source.label_names, counts, strict=True))},
    )


def _build_preferences(
    examples: Examples[Preference], *, config: PreferencesConfig, tokenizer: PreTrainedTokenizerBase
) -> PreferenceSplit:
    has_messages = any(pair.has_messages for pair in examples.items)
    if has_messages and config.template == "auto" and tokenizer.chat_template is None:
        raise ConfigError(
            "`model.path` must have a tokenizer with a chat template, because the data has lists of messages, but has "
            "none. Use another model, `data.template=FILE.jinja`, or `data.template=plain` to join the texts."
        )
    answers = [answer for pair in examples.items for answer in (pair.chosen, pair.rejected)]
    shared: Any = {"name": examples.name, "fingerprint": examples.fingerprint, "notes": examples.notes}
    rows = _build_chats(Examples(items=answers, **shared), config=config, tokenizer=tokenizer, size=2)
    return PreferenceSplit(completions=rows, groups=rows.groups[::2], **shared)


def _build_chats(
    examples: Examples[Conversation],
    *,
    config: ChatConfig | PreferencesConfig,
    tokenizer: PreTrainedTokenizerBase,
    size: int = 1,
) -> CompletionSplit:
    columns = tokenise_chats(examples, config=config, tokenizer=tokenizer)
    texts = [message.content for conversation in examples.items for message in conversation.messages]
    groups = [item.group or str(row) for row, item in enumerate(examples.items)]
    rows, targets = columns["row"].values.tolist(), columns["targets"]
    is_whole = (columns["full_length"].values <= config.max_length) & (targets.values[targets.ends - 1] != IGNORED)
    shared = _shared_fields(examples, columns, texts=texts, config=config, tokenizer=tokenizer)
    split = CompletionSplit(
        **{**shared, "groups": tuple(groups[row] for row in rows)},
        targets=targets,
        answer_starts=columns["answer_start"].values.where(is_whole, 0),
        rows=tuple(examples.items[row].row for row in rows),
        scored_bytes=int(columns["scored_bytes"].values.sum()),
        facts={
            "conversations": len(examples),
            "without_reasoning": int(columns["omits_reasoning"].values.sum()),
            "after_added_end": int(columns["follows_added_end"].values.sum()),
            **describe_chat_format(config, tokenizer),
        },
    )
    split = split.drop_unscored(size=size)
    if not len(split):
        raise ConfigError(
            f"the {split.name} split of `data={config.name}` must have a token to predict, but all its answers are "
            "cut off. Raise `data.max_length`, or use other data."
        )
    return split


def _shared_fields(
    examples: Examples[Any],
    columns: Mapping[str, Ragged],
    *,
    texts: list[str],
    config: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    pad_tokens = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(token, int)]
    return {
        "name": examples.name,
        "notes": examples.notes,
        "groups": tuple(str(row) if item.group is None else item.group for row, item in enumerate(examples.items)),
        "fingerprint": examples.fingerprint,
        "tokens": columns["input_ids"],
        "pad_token": pad_tokens[0] if pad_tokens else 0,  # 0 is as good, because padded positions are masked
        "bytes": sum(len(text.encode()) for text in texts),
        "truncated": int((columns["full_length"].values > config.max_length).sum()),
    }
