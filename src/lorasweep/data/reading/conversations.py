"""Reads conversations from columns of prompts and completions, or from lists of messages."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lorasweep.config.data import ChatConfig
from lorasweep.data.reading.tables import choose_columns, open_tables, parse_rows, require_text
from lorasweep.data.source import Conversation, DataSource, Message, ReadExamples, Role, build_source, content_key
from lorasweep.errors import ConfigError
from lorasweep.wording import shorten

KNOWN_COLUMNS: Sequence[tuple[str, ...]] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
"""Columns that are tried in this order if the user names none."""
ROLES: Mapping[str, Role] = {**{role: role for role in get_args(Role)}, "human": "user", "gpt": "assistant"}
"""Our role for each role name in a file. ShareGPT's files have `human` and `gpt`."""
MIN_PROMPTS = 20
"""With fewer different prompts, the whole conversation decides its split, not the prompt."""


def read_conversations(config: ChatConfig) -> DataSource:
    """Returns the conversations of a table. Raises ConfigError if one can't be used, or a column is missing."""
    tables = open_tables(config, functools.partial(_choose_columns, config))

    def read(split: str) -> ReadExamples[Conversation]:
        items, notes = parse_rows(tables[split], _parse_row)
        return items, [f"Conversations of {split} are read from {' and '.join(tables[split].columns)}.", *notes]

    train = read("train")
    # Conversations with the same prompt go to the same split, so that validation repeats no prompt of training.
    is_split_by_prompt = len(set(map(_prompt_key, train[0]))) >= MIN_PROMPTS
    return build_source(
        train,
        read,
        kind="conversations",
        missing=config.split_percents,
        key=_prompt_key if is_split_by_prompt else _whole_key,
        describe=lambda train, _: [
            f"train has {len(train)} conversations with {len(set(map(_prompt_key, train)))} different prompts."
        ],
        shared="prompt" if is_split_by_prompt else "content",
        max_examples=config.max_examples,
    )


def _prompt_key(conversation: Conversation) -> int:
    """Returns the content key of the messages before the assistant's first answer."""
    prompt = itertools.takewhile(lambda message: message.role != "assistant", conversation.messages)
    return content_key(text for message in prompt for text in message)


def _whole_key(conversation: Conversation) -> int:
    return content_key(text for message in conversation.messages for text in message)


def _choose_columns(config: ChatConfig, names: Sequence[str], source: str) -> list[str]:
    wanted = (("messages", config.messages), ("prompt", config.prompt), ("completion", config.completion))
    if columns := choose_columns(wanted, names, source):
        return columns
    for known in KNOWN_COLUMNS:
        if set(known) <= set(names):
            return list(known)
    raise ConfigError(
        f"{source} must have columns `prompt` and `completion`, or `messages`, but has {shorten(list(names), 400)}. "
        "Set `data.prompt` and `data.completion`, or `data.messages`, to its columns."
    )


def _parse_row(*values: Any, group: str | None) -> Conversation:
    """Returns the messages of a row. A prompt or completion may be a list of messages (TRL's conversational format)."""
    roles: Sequence[Role] = ("user", "assistant")
    messages: list[Message] = []
    for role, value in zip(roles, values, strict=False):
        if isinstance(value, list):
            messages += [_parse_message(message) for message in value]
        elif len(values) == 2:
            messages.append(Message(role, require_text(value)))
        else:
            raise ValueError(f"must have a list of messages, but has {shorten(value)}")
    if not messages or messages[-1].role != "assistant":
        roles_given = [message.role for message in messages]
        raise ValueError(f"must have messages that end with the assistant's, but has the roles {shorten(roles_given)}")
    conversation = Conversation(messages, group)
    return conversation if group is not None else conversation._replace(group=f"{_prompt_key(conversation):016x}")


def _parse_message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"must have messages with `role` and `content`, but has {shorten(message)}")
    # the reader may give every message the keys of all messages, with None for those that it lacks
    role = str(message.get("role") or message.get("from"))
    if role not in ROLES:
        raise ValueError(f"must have messages of the roles {', '.join(get_args(Role))}, but has {shorten(role)}")
    return Message(ROLES[role], require_text(message.get("content") or message.get("value")))
