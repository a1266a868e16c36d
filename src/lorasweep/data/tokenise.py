"""Tokenises examples. The token ids stay in the cache folder of `datasets` for later runs and sweeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import ChatConfig
from lorasweep.data.examples import Ragged
from lorasweep.data.reading.tables import quiet_datasets
from lorasweep.data.source import Conversation, Document, Examples, LabelledText, Message
from lorasweep.data.split import IGNORED
from lorasweep.errors import ConfigError

CACHE_FORMAT = 3
"""Part of every cache key. Raise it when this module tokenises the same examples differently than before."""
Columns = dict[str, list[Any]]
Encoder = Callable[[Sequence[Message]], tuple[list[int], list[bool]]]
"""A function from the messages of a conversation to its token ids, and for each token whether it is scored."""


def tokenise_documents(examples: Examples[Document], *, tokenizer: PreTrainedTokenizerBase) -> Ragged:
    """Returns the token ids of whole documents, each followed by the tokenizer's end-of-text token."""
    end = get_end_token(tokenizer)

    def tokenise(columns: Columns) -> Columns:
        return {"input_ids": [[*ids, end] for ids in tokenise_plain(columns["text"], tokenizer)]}

    columns = {"text": [document.text for document in examples.items]}
    return map_cached(columns, tokenise, key=cache_key(tokenizer, examples.fingerprint, form="text"))["input_ids"]


def tokenise_labelled(
    examples: Examples[LabelledText], *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Ragged]:
    """Returns `input_ids`, and `full_length`: the number of tokens of each example before truncation.

    For pairs of texts, also returns `token_type_ids` if the model uses them.
    """
    columns: Columns = {"text": [example.text for example in examples.items]}
    if any(example.pair is not None for example in examples.items):
        columns["pair"] = [example.pair for example in examples.items]
    has_types = "pair" in columns and "token_type_ids" in tokenizer.model_input_names

    def tokenise(columns: Columns) -> Columns:
        full = tokenizer(*columns.values(), return_attention_mask=False, verbose=False)["input_ids"]
        cut = tokenizer(*columns.values(), truncation=True, max_length=max_length, return_token_type_ids=has_types)
        result = {"input_ids": cut["input_ids"], "full_length": [[len(ids)] for ids in full]}
        return {**result, "token_type_ids": cut["token_type_ids"]} if has_types else result

    key = cache_key(tokenizer, examples.fingerprint, form="labelled", max_length=max_length)
    return map_cached(columns, tokenise, key=key)


def tokenise_chats(
    examples: Examples[Conversation], *, config: ChatConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Ragged]:
    """Returns `input_ids`, `targets`, `full_length` and `scored_bytes` of conversations for a causal model.

    `targets` has the next token at each position if the assistant wrote this token, otherwise `IGNORED`. `full_length`
    is the number of tokens before truncation. `scored_bytes` is the number of UTF-8 bytes of the scored tokens.

    Raises:
        ConfigError: The tokenizer lacks a chat template or an end-of-text token, or its template fails.
    """
    with_template, max_length = _uses_template(config, tokenizer), config.max_length
    if with_template and tokenizer.chat_template is None:
        raise ConfigError(
            "`data.template=model` needs a tokenizer with a chat template, but this model's tokenizer has none. "
            "Use `data.template=plain`."
        )
    encode = _template_encoder(tokenizer) if with_template else _plain_encoder(tokenizer, config.separator)

    def tokenise(columns: Columns) -> Columns:
        result: Columns = {"input_ids": [], "targets": [], "full_length": [], "scored_bytes": []}
        for text in columns["conversation"]:
            ids, scored = encode([Message(*message) for message in json.loads(text)])
            # Position i predicts token i + 1. The targets are shifted here, so the loss must not shift them again.
            following = [token if is_scored else IGNORED for token, is_scored in zip(ids[1:], scored[1:], strict=True)]
            result["input_ids"].append(ids[:-1][:max_length])
            result["targets"].append(following[:max_length])
            result["full_length"].append([len(ids) - 1])
            answer = [token for token in following[:max_length] if token != IGNORED]
            result["scored_bytes"].append([len(str(tokenizer.decode(answer, skip_special_tokens=True)).encode())])
        return result

    # JSON, because `datasets` would store a list of messages as a nested column.
    texts = [json.dumps(conversation.messages) for conversation in examples.items]
    form = "template" if with_template else "plain"
    key = cache_key(tokenizer, examples.fingerprint, form=form, separator=config.separator, max_length=max_length)
    return map_cached({"conversation": texts}, tokenise, key=key)


def describe_chat_format(config: ChatConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns Python code for how a prompt and its completion become one example."""
    if _uses_template(config, tokenizer):
        return "tokenizer.apply_chat_template(messages)"
    start = f"{tokenizer.bos_token!r} + " if tokenizer.bos_token else ""
    text = f"{start}prompt + {config.separator!r} + completion + {tokenizer.eos_token!r}"
    return f"tokenizer({text}, add_special_tokens=False)"


def _uses_template(config: ChatConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    # `auto` uses the chat template if the tokenizer has one, because the model was trained with it.
    return config.template == "model" or (config.template == "auto" and tokenizer.chat_template is not None)


def get_end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the end-of-text token. Raises ConfigError if the tokenizer has none."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ConfigError(
            "`model.path` must have a tokenizer with an end-of-text token, but has none. Use another model."
        )
    return end


def tokenise_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns token ids without special tokens. Even `<|endoftext|>` inside a text becomes several ordinary tokens."""
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about texts longer than the model's context: they are cut later
    )["input_ids"]
    return ids


def cache_key(tokenizer: PreTrainedTokenizerBase, fingerprint: str, **settings: Any) -> str:
    """Returns 32 hex digits that differ for other examples, tokenizers, settings or values of `CACHE_FORMAT`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any
    if backend is None:
        rules = sorted(tokenizer.get_vocab().items())
    else:  # without the truncation and padding of its latest call
        serialised = json.loads(backend.to_str()).items()
        rules = {name: rule for name, rule in serialised if name not in ("truncation", "padding")}
    tokenizer_parts = [rules, str(tokenizer.chat_template), tokenizer.padding_side]
    parts = [CACHE_FORMAT, fingerprint, *tokenizer_parts, sorted(settings.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def map_cached(columns: Columns, tokenise: Callable[[Columns], Columns], *, key: str) -> dict[str, Ragged]:
    """Returns the result of `tokenise` on these columns. Takes it from the cache of `datasets` if possible."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lorasweep"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target: dict[str, Any] = {"cache_file_name": str(folder / f"{key}.arrow")}
    except OSError:  # the cache is not writable, so each run tokenises the examples again
        target = {"keep_in_memory": True}
    with quiet_datasets():
        texts = datasets.Dataset.from_dict(columns)
        ids = texts.map(tokenise, batched=True, remove_columns=list(columns), new_fingerprint=key, **target)
        table = ids.with_format("arrow")[:]
    return {name: _to_ragged(table.column(name).combine_chunks()) for name in table.column_names}


def _to_ragged(column: Any) -> Ragged:
    ends = torch.from_numpy(column.offsets.to_numpy(zero_copy_only=False)[1:].astype("int64"))
    values = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).astype("int64"))
    return Ragged(values=values, ends=ends)


def _template_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    # A template has no markers of who wrote a token. So the conversation is formatted before and after each answer, and
    # the tokens that an answer adds are scored.
    def encode(messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        scored: list[bool] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = _apply_template(tokenizer, messages[:index], add_generation_prompt=True)
            after = _apply_template(tokenizer, messages[: index + 1], add_generation_prompt=False)
            if after[: len(before)] != before or before[: len(ids)] != ids:
                raise ConfigError(
                    "the model's chat template must leave earlier messages as they are, but changes them. "
                    "Use `data.template=plain`."
                )
            scored += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
            ids = after
        return ids, scored

    return encode


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(
            [message._asdict() for message in messages],
            tokenize=True,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
        )
    except Exception as error:  # a jinja template can raise any class of error
        raise ConfigError(
            f"the model's chat template must accept these conversations, but failed: {error}. "
            "Use `data.template=plain`."
        ) from error
    return list(ids)


def _plain_encoder(tokenizer: PreTrainedTokenizerBase, separator: str) -> Encoder:
    end = get_end_token(tokenizer)
    start = [tokenizer.bos_token_id] if isinstance(tokenizer.bos_token_id, int) else []
    between = tokenise_plain([separator], tokenizer)[0]

    def encode(messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        ids, scored = list(start), [False] * len(start)
        contents = tokenise_plain([message.content for message in messages], tokenizer)
        for index, (message, tokens) in enumerate(zip(messages, contents, strict=True)):
            is_answer = message.role == "assistant"
            if index:
                ids, scored = ids + between, scored + [False] * len(between)
            ids = [*ids, *tokens, *([end] if is_answer else [])]
            scored += [is_answer] * (len(tokens) + is_answer)
        return ids, scored

    return encode
