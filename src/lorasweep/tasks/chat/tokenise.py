"""Tokenises conversations by a chat template, or as plain texts one after the other."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lorasweep.data.rows import IGNORED, Ragged
from lorasweep.data.source import Examples
from lorasweep.data.tokenise import Columns, cache_key, digest_template, get_end_token, map_cached, tokenise_plain
from lorasweep.errors import ConfigError
from lorasweep.tasks.chat.read import Conversation
from lorasweep.tasks.chat.settings import ConversationSettings
from lorasweep.tasks.chat.template import ChatTemplate, Turn, read_template


@dataclass(kw_only=True)
class ChatTokens:
    """The tokens of one example."""

    ids: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    """The same tokens, with `IGNORED` in the place of those that are not scored."""
    answer_start: int = 0
    """The number of tokens before the last answer."""

    def extend(self, ids: Sequence[int], *, is_scored: bool) -> None:
        self.ids += ids
        self.scored += ids if is_scored else [IGNORED] * len(ids)


Encoder = Callable[[Sequence[Conversation]], Iterator[list[ChatTokens]]]
"""A function that yields the examples of each conversation."""


def tokenise_chats(
    examples: Examples[Conversation], *, config: ConversationSettings, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Ragged]:
    """Returns the examples of conversations for a causal model.

    A conversation is one example, if each of its prompts begins with the tokens of the turns before. Otherwise each
    answer whose prompt does not is the first of a new example.

    - `input_ids`, and `targets`: the next token at each position if the assistant wrote it, otherwise `IGNORED`.
    - `row`: the index of the example's conversation.
    - `answer_start`: the number of tokens before the last answer.
    - `full_length`: the number of tokens before truncation.
    - `scored_bytes`: the number of UTF-8 bytes of the scored tokens.

    Raises:
        ConfigError: The tokenizer lacks a chat template or an end-of-text token, or its template can't be used.
    """
    template, max_length, only_last = read_template(config, tokenizer), config.max_length, config.scored_turns == "last"
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
                result["full_length"].append([len(following)])
                answer = [token for token in following[:max_length] if token != IGNORED]
                result["scored_bytes"].append([len(str(tokenizer.decode(answer, skip_special_tokens=True)).encode())])
        return result

    settings = {
        "form": ["plain"] if template is None else ["template", template.text, dict(template.arguments)],
        **{name: getattr(config, name) for name in ("template_date", "separator", "max_length")},
        "turns": config.scored_turns,
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
    return {
        "format": f"tokenizer.apply_chat_template({', '.join(words)})",
        "template": digest_template(str(template.text or tokenizer.chat_template)),
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
        for turn in turns:
            prompt, text = tokenise(turn.prompt), turn.prompt
            if not examples or prompt[: len(examples[-1].ids)] != examples[-1].ids:
                # the first turn, or the template rewrites earlier turns, or writes no token at their end
                examples.append(ChatTokens())
            tokens = examples[-1]
            tokens.extend(prompt[len(tokens.ids) :], is_scored=False)
            tokens.answer_start = len(prompt)
            for more, is_scored in turn.answer:
                tokens.extend(tokenise_after(text, tokens.ids, more), is_scored=is_scored)
                text += more
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
            prompt = ""
        return [tokens]

    return lambda conversations: map(encode, conversations)
