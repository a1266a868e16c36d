"""Tokenises the examples of a source. The cache of `datasets` keeps the token ids for the next run or sweep.

`splits` calls these functions, and makes splits of the ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from lorasweep.data.examples import Ragged
from lorasweep.data.source import Conversation, LabelledText, Message
from lorasweep.data.split import IGNORED
from lorasweep.errors import ConfigError

CACHE_FORMAT = 3
"""Goes into every cache key: raise it when the ids of the same examples change."""
Columns = dict[str, list[Any]]
Encoder = Callable[[Sequence[Message]], tuple[list[int], list[bool]]]
"""Takes a conversation, returns its token ids and whether each one is scored."""


def tokenise_texts(texts: Sequence[str], *, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> dict[str, Ragged]:
    """Returns the `input_ids` of whole texts, each followed by the tokenizer's end-of-text token.

    A text that spells out a special token (`<|endoftext|>`) is text and becomes ordinary tokens.

    Raises:
        ConfigError: The tokenizer has no end-of-text token.
    """
    end = end_token(tokenizer)

    def tokenise(columns: Columns) -> Columns:
        ids = plain_ids(columns["text"], tokenizer)
        return {"input_ids": [[*row, end] for row in ids]}

    return map_cached({"text": list(texts)}, tokenise, key=cache_key(tokenizer, fingerprint, form="text"))


def tokenise_labelled(
    examples: Sequence[LabelledText], *, tokenizer: PreTrainedTokenizerBase, max_length: int, fingerprint: str
) -> dict[str, Ragged]:
    """Returns `input_ids`, and `full_length`: the number of tokens of each example before it was cut.

    Pairs also have `token_type_ids` if the tokenizer uses them to distinguish the two texts.
    """
    columns: Columns = {"text": [example.text for example in examples]}
    if any(example.pair is not None for example in examples):
        columns["pair"] = [example.pair for example in examples]
    typed = "pair" in columns and "token_type_ids" in tokenizer.model_input_names

    def tokenise(columns: Columns) -> Columns:
        whole = tokenizer(*columns.values(), return_attention_mask=False, verbose=False)["input_ids"]
        cut = tokenizer(*columns.values(), truncation=True, max_length=max_length, return_token_type_ids=typed)
        kept = {"input_ids": cut["input_ids"], "full_length": [[len(ids)] for ids in whole]}
        return {**kept, "token_type_ids": cut["token_type_ids"]} if typed else kept

    return map_cached(columns, tokenise, key=cache_key(tokenizer, fingerprint, form="labelled", max_length=max_length))


def tokenise_chats(
    conversations: Sequence[Conversation],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    separator: str,
    max_length: int,
    fingerprint: str,
) -> dict[str, Ragged]:
    """Returns `input_ids` and `targets`: the next token where the assistant says it, else `IGNORED`.

    Also `full_length` as in `tokenise_labelled`, and `scored_bytes`, one number per example.

    Raises:
        ConfigError: The tokenizer has no chat template, or one that does not take these conversations, or no
            end-of-text token for a plain template.
    """
    # `auto` uses the chat template if the tokenizer has one, because the model was trained with it.
    with_template = template == "model" or (template == "auto" and tokenizer.chat_template is not None)
    if with_template and tokenizer.chat_template is None:
        raise ConfigError(
            "`data.template=model` needs a tokenizer with a chat template, but this model's has none. "
            "Use `data.template=plain`."
        )
    encode = _template_encoder(tokenizer) if with_template else _plain_encoder(tokenizer, separator)

    def tokenise(columns: Columns) -> Columns:
        made: Columns = {"input_ids": [], "targets": [], "full_length": [], "scored_bytes": []}
        for text in columns["conversation"]:
            ids, scored = encode([Message(*message) for message in json.loads(text)])
            # Position i predicts token i + 1, so targets are shifted here and the model must not shift them again.
            following = [token if is_scored else IGNORED for token, is_scored in zip(ids[1:], scored[1:], strict=True)]
            made["input_ids"].append(ids[:-1][:max_length])
            made["targets"].append(following[:max_length])
            made["full_length"].append([len(ids) - 1])
            kept = [token for token in following[:max_length] if token != IGNORED]
            made["scored_bytes"].append([len(str(tokenizer.decode(kept, skip_special_tokens=True)).encode())])
        return made

    # `datasets` gets one JSON text per conversation, so that its column is a plain column of texts.
    texts = [json.dumps(conversation) for conversation in conversations]
    form = "template" if with_template else "plain"
    key = cache_key(tokenizer, fingerprint, form=form, separator=separator, max_length=max_length)
    return map_cached({"conversation": texts}, tokenise, key=key)


def tokenise_sequences(
    conversations: Sequence[Conversation],
    *,
    tokenizer: PreTrainedTokenizerBase,
    separator: str,
    max_length: int,
    fingerprint: str,
) -> dict[str, Ragged]:
    """Returns the examples of an encoder-decoder: `input_ids` are all messages but the last, `targets` the last one.

    Also `full_length` and `scored_bytes` as in `tokenise_chats`.
    """

    def tokenise(columns: Columns) -> Columns:
        source = tokenizer(columns["source"], return_attention_mask=False, verbose=False)["input_ids"]
        # `text_target` selects the tokenizer of the output language, where a model has two (Marian, mBART).
        target = tokenizer(text_target=columns["target"], return_attention_mask=False, verbose=False)["input_ids"]
        return {
            "input_ids": [_cut(row, max_length) for row in source],
            "targets": [_cut(row, max_length) for row in target],
            "full_length": [[max(len(a), len(b))] for a, b in zip(source, target, strict=True)],
            "scored_bytes": [[len(text.encode())] for text in columns["target"]],
        }

    columns = {
        "source": [separator.join(message.content for message in row[:-1]) for row in conversations],
        "target": [row[-1].content for row in conversations],
    }
    key = cache_key(tokenizer, fingerprint, form="sequences", separator=separator, max_length=max_length)
    return map_cached(columns, tokenise, key=key)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that ends a text.

    Raises:
        ConfigError: There is none.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ConfigError(
            "`model.path` must have a tokenizer with an end-of-text token, but has none. Use another model."
        )
    return end


def plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of texts without special tokens; a text that spells one out becomes ordinary tokens."""
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model's context is expected: it is cut
    )["input_ids"]
    return ids


def cache_key(tokenizer: PreTrainedTokenizerBase, fingerprint: str, **settings: Any) -> str:
    """Returns 32 hex digits that change with the examples, the tokenizer, the settings or `CACHE_FORMAT`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    tokenizer_parts = [made, str(tokenizer.chat_template), tokenizer.padding_side]
    parts = [CACHE_FORMAT, fingerprint, *tokenizer_parts, sorted(settings.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def map_cached(columns: Columns, tokenise: Callable[[Columns], Columns], *, key: str) -> dict[str, Ragged]:
    """Returns the result of `tokenise` on these columns, from the cache of `datasets` if the key is in it."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lorasweep"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        where: dict[str, Any] = {"cache_file_name": str(folder / f"{key}.arrow")}
    except OSError:  # a cache that can't be written to costs time, nothing else
        where = {"keep_in_memory": True}
    with _quiet():
        rows = datasets.Dataset.from_dict(columns)
        made = rows.map(tokenise, batched=True, remove_columns=list(columns), new_fingerprint=key, **where)
        table = made.with_format("arrow")[:]
    return {name: _ragged(table.column(name).combine_chunks()) for name in table.column_names}


def _ragged(column: Any) -> Ragged:
    ends = torch.from_numpy(column.offsets.to_numpy(zero_copy_only=False)[1:].astype("int64"))
    values = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).astype("int64"))
    return Ragged(values=values, ends=ends)


def _template_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    def encode(messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        scored: list[bool] = []
        for place, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = _apply(tokenizer, messages[:place], add_generation_prompt=True)
            after = _apply(tokenizer, messages[: place + 1], add_generation_prompt=False)
            if after[: len(before)] != before or before[: len(ids)] != ids:
                raise ConfigError(
                    "the model's chat template must write a conversation from left to right, but changes earlier "
                    "messages when an answer is added. Use `data.template=plain`."
                )
            scored += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
            ids = after
        return ids, scored

    return encode


def _apply(
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
            f"the model's chat template must take these conversations, but does not: {error}. "
            "Use `data.template=plain`."
        ) from error
    return list(ids)


def _plain_encoder(tokenizer: PreTrainedTokenizerBase, separator: str) -> Encoder:
    end = end_token(tokenizer)
    start = [tokenizer.bos_token_id] if isinstance(tokenizer.bos_token_id, int) else []

    def encode(messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        ids, scored = list(start), [False] * len(start)
        for place, (message, tokens) in enumerate(
            zip(messages, plain_ids([message.content for message in messages], tokenizer), strict=True)
        ):
            is_answer = message.role == "assistant"
            if place and separator:
                between = plain_ids([separator], tokenizer)[0]
                ids, scored = ids + between, scored + [False] * len(between)
            ids = [*ids, *tokens, *([end] if is_answer else [])]
            scored += [is_answer] * (len(tokens) + is_answer)
        return ids, scored

    return encode


def _cut(row: list[int], length: int) -> list[int]:
    """Returns at most `length` tokens; the last one, which ends the text, stays."""
    return row if len(row) <= length else [*row[: length - 1], row[-1]]


@contextmanager
def _quiet() -> Iterator[None]:
    was_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_shown:
            datasets.enable_progress_bars()
