"""Tokenises examples. The token ids stay in the cache folder of `datasets` for later runs and sweeps."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasweep.config.data import ChatConfig, ConversationSettings, PreferencesConfig
from lorasweep.data.chat_template import ChatTemplate, Turn, digest_template, read_template
from lorasweep.data.source import Conversation, Document, Example, Examples, LabelledText, list_texts
from lorasweep.data.split import IGNORED, Ragged
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError

CACHE_FORMAT = 6
"""Part of every cache key. Raise it when this module tokenises the same examples differently than before."""
MIN_SHOWN_CHARACTERS = 10_000_000
"""A progress bar is shown while at least as much text is tokenised, which takes seconds."""
BATCH_ROWS = 1000
"""Number of examples that are tokenised together."""
Columns = dict[str, list[Any]]


@dataclass(kw_only=True)
class ChatTokens:
    """The tokens of one example."""

    ids: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    """The same tokens, with `IGNORED` in the place of those that are not scored."""
    answer_start: int = 0
    """The number of tokens before the last answer."""
    omits_reasoning: bool = False
    """Whether the template left out the reasoning of an answer."""

    follows_added_end: bool = False
    """Whether it begins here only because the turn before ends with a token that the template does not write."""

    def extend(self, ids: Sequence[int], *, is_scored: bool) -> None:
        self.ids += ids
        self.scored += ids if is_scored else [IGNORED] * len(ids)


Encoder = Callable[[Sequence[Conversation]], Iterator[list[ChatTokens]]]
"""A function that yields the examples of each conversation."""


def tokenise_documents(examples: Examples[Document], *, tokenizer: PreTrainedTokenizerBase) -> Ragged:
    """Returns the token ids of whole documents, each followed by the tokenizer's end-of-text token."""
    end = get_end_token(tokenizer)

    def tokenise(documents: Sequence[Document]) -> Columns:
        ids = tokenise_plain([document.text for document in documents], tokenizer)
        return {"input_ids": [[*document, end] for document in ids]}

    return map_cached(examples, tokenise, key=cache_key(tokenizer, examples.fingerprint, form="text"))["input_ids"]


def tokenise_labelled(
    examples: Examples[LabelledText], *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Ragged]:
    """Returns `input_ids`, and `full_length`: the number of tokens of each example before truncation.

    For pairs of texts, also returns `token_type_ids` if the model uses them.
    """
    has_pairs = any(example.pair is not None for example in examples.items)
    has_types = has_pairs and "token_type_ids" in tokenizer.model_input_names

    def tokenise(rows: Sequence[LabelledText]) -> Columns:
        texts = [[row.text for row in rows], *([[row.pair for row in rows]] if has_pairs else [])]
        full = tokenizer(*texts, return_attention_mask=False, verbose=False)["input_ids"]
        cut = tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=has_types)
        result = {"input_ids": cut["input_ids"], "full_length": [[len(ids)] for ids in full]}
        return {**result, "token_type_ids": cut["token_type_ids"]} if has_types else result

    key = cache_key(tokenizer, examples.fingerprint, form="labelled", max_length=max_length)
    return map_cached(examples, tokenise, key=key)


def tokenise_chats(
    examples: Examples[Conversation], *, config: ChatConfig | PreferencesConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Ragged]:
    """Returns the examples of conversations for a causal model.

    A conversation is one example, if each of its prompts begins with the tokens of the turns before. Otherwise each
    answer whose prompt does not is the first of a new example.

    - `input_ids`, and `targets`: the next token at each position if the assistant wrote it, otherwise `IGNORED`.
    - `row`: the index of the example's conversation. `omits_reasoning`: 1 if the template left out reasoning.
    - `follows_added_end`: 1 if only the end-of-text token that was added to the answer before made it an example.
    - `answer_start`: the number of tokens before the last answer.
    - `full_length`: the number of tokens before truncation.
    - `scored_bytes`: the number of UTF-8 bytes of the scored tokens.

    Raises:
        ConfigError: The tokenizer lacks a chat template or an end-of-text token, or its template can't be used.
    """
    template, max_length, only_last = read_template(config, tokenizer), config.max_length, config.turns == "last"
    if template is None:
        encode = _plain_encoder(tokenizer, config.separator, only_last=only_last)
    else:
        encode = _template_encoder(tokenizer, template, only_last=only_last)

    rows = itertools.count()

    def tokenise(conversations: Sequence[Conversation]) -> Columns:
        result: Columns = defaultdict(list)
        for examples, row in zip(encode(conversations), rows, strict=False):
            for tokens in examples:
                # Position i predicts token i + 1. The targets are shifted here, so the loss must not shift them again.
                following = tokens.scored[1:]
                result["input_ids"].append(tokens.ids[:-1][:max_length])
                result["targets"].append(following[:max_length])
                result["row"].append([row])
                result["answer_start"].append([tokens.answer_start])
                result["omits_reasoning"].append([int(tokens.omits_reasoning)])
                result["follows_added_end"].append([int(tokens.follows_added_end)])
                result["full_length"].append([len(following)])
                answer = [token for token in following[:max_length] if token != IGNORED]
                result["scored_bytes"].append([len(str(tokenizer.decode(answer, skip_special_tokens=True)).encode())])
        return result

    settings = {
        "form": ["plain"] if template is None else ["template", template.text, dict(template.arguments)],
        **{name: getattr(config, name) for name in ("template_date", "separator", "turns", "max_length")},
    }
    key = cache_key(tokenizer, examples.fingerprint, **settings)
    return map_cached(examples, tokenise, key=key)


def describe_chat_format(config: ConversationSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns `format`, Python code for the tokens of a prompt, or without a template of a prompt with its completion.

    With a template, also returns `template`: the first 16 hex digits of its SHA-256.
    """
    template = read_template(config, tokenizer)
    if template is None:
        start = f"{tokenizer.bos_token!r} + " if tokenizer.bos_token else ""
        text = f"{start}prompt + {config.separator!r} + completion + {tokenizer.eos_token!r}"
        return {"format": f"tokenizer({text}, add_special_tokens=False)"}
    words = ["messages", "add_generation_prompt=True"]
    words += [f"{name}={value!r}" for name, value in template.arguments.items()]
    words += [] if template.text is None else [f"chat_template=open({config.template!r}).read()"]
    return {"format": f"tokenizer.apply_chat_template({', '.join(words)})", "template": digest_template(template)}


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
    tokenizer_parts = [rules, str(tokenizer.chat_template), str(tokenizer.special_tokens_map), tokenizer.padding_side]
    parts = [CACHE_FORMAT, fingerprint, *tokenizer_parts, sorted(settings.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def map_cached(
    examples: Examples[Example], tokenise: Callable[[Sequence[Example]], Columns], *, key: str
) -> dict[str, Ragged]:
    """Returns the sequences that `tokenise` makes of the examples. Takes them from the cache if possible."""
    folder = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME, "datasets")), "lorasweep")
    path = folder / f"{key}.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):  # not tokenised yet, or damaged
        parts: dict[str, list[Tensor]] = defaultdict(list)
        is_quiet = sum(len(text) for item in examples.items for text in list_texts(item)) < MIN_SHOWN_CHARACTERS
        starts = range(0, len(examples), BATCH_ROWS)
        for start in track(starts, "tokenising", console=Console(stderr=True), disable=is_quiet):
            for name, rows in tokenise(examples.items[start : start + BATCH_ROWS]).items():
                parts[f"{name}.values"].append(torch.tensor(list(itertools.chain(*rows)), dtype=torch.int32))
                parts[f"{name}.lengths"].append(torch.tensor(list(map(len, rows)), dtype=torch.int32))
        tensors = {name: torch.cat(tensors) for name, tensors in parts.items()}
        with suppress(OSError):  # the cache is not writable, so each run tokenises the examples again
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save(tensors))
    names = [name.removesuffix(".values") for name in tensors if name.endswith(".values")]
    return {
        name: Ragged(values=tensors[f"{name}.values"].long(), ends=tensors[f"{name}.lengths"].long().cumsum(0))
        for name in names
    }


def _template_encoder(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, *, only_last: bool) -> Encoder:
    get_end_token(tokenizer)  # raises if an answer could not end

    def tokenise(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def tokenise_after(text: str, ids: Sequence[int], more: str) -> list[int]:
        """Returns the tokens of `more` after a text whose tokens are given: the server does not tokenise it again."""
        whole = tokenise(text + more)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        # Tokens merge across the border. After a line feed, SentencePiece adds no space to the start of the text.
        feed, after = tokenise("\n"), tokenise("\n" + more)
        return after[len(feed) :] if after[: len(feed)] == feed else tokenise(more)

    def encode(turns: Sequence[Turn]) -> list[ChatTokens]:
        examples: list[ChatTokens] = []
        added = ""  # the text up to an answer to which the end-of-text token was added
        for turn in turns:
            prompt, text = tokenise(turn.prompt), turn.prompt
            if not examples or prompt[: len(examples[-1].ids)] != examples[-1].ids:
                # the first turn, or the template rewrites earlier turns, or writes no token at their end
                examples.append(ChatTokens(follows_added_end=bool(added) and turn.prompt.startswith(added)))
            tokens = examples[-1]
            tokens.omits_reasoning |= turn.omits_reasoning
            tokens.extend(prompt[len(tokens.ids) :], is_scored=False)
            tokens.answer_start = len(prompt)
            for more, is_scored in turn.answer:
                tokens.extend(tokenise_after(text, tokens.ids, more), is_scored=is_scored)
                text += more
            added = text.removesuffix(str(tokenizer.eos_token)) if turn.adds_end else ""
        return examples

    return lambda conversations: map(encode, template.render_turns(conversations, only_last=only_last))


def _plain_encoder(tokenizer: PreTrainedTokenizerBase, separator: str, *, only_last: bool) -> Encoder:
    end = get_end_token(tokenizer)
    start = [tokenizer.bos_token_id] if isinstance(tokenizer.bos_token_id, int) else []

    def encode(conversation: Conversation) -> list[ChatTokens]:
        tokens, prompt = ChatTokens(), ""
        tokens.extend(start, is_scored=False)
        for index, message in enumerate(conversation.messages):
            if "tool_calls" in message.fields:
                raise ConfigError(
                    "`data.template=plain` must have conversations without tool calls, but one has some. "
                    "Use a chat template that writes them."
                )
            prompt += separator if index else ""
            if message.role != "assistant":
                prompt += message.content
                continue
            # A prompt is tokenised as a whole, as a server does; the answer apart, as the model generates it.
            before, answer = tokenise_plain([prompt, message.content], tokenizer)
            tokens.extend(before, is_scored=False)
            tokens.answer_start = len(tokens.ids)
            is_last = index == len(conversation.messages) - 1
            tokens.extend([*answer, end], is_scored=message.is_trained and (is_last or not only_last))
            tokens.omits_reasoning |= "reasoning_content" in message.fields
            prompt = ""
        return [tokens]

    return lambda conversations: map(encode, conversations)
