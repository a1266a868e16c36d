"""Conversations, from columns of prompts and completions or of lists of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lorasweep.config.data import ChatConfig
from lorasweep.data.reading.splitting import Checked, build_source, content_key
from lorasweep.data.reading.tables import LoadTable, choose_columns, parse_rows, require_text
from lorasweep.data.source import Conversation, DataSource, Message, Role
from lorasweep.errors import ConfigError
from lorasweep.wording import shorten

KNOWN_COLUMNS: Sequence[tuple[str, ...]] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
"""Columns that are tried, in this order, if the user names none."""
ROLES: Mapping[str, Role] = {**{role: role for role in get_args(Role)}, "human": "user", "gpt": "assistant"}
"""Names of roles, those of ShareGPT's files included."""
MIN_PROMPTS = 20
"""With fewer different prompts than this, conversations are split by their whole content, not by the prompt."""


def read_conversations(config: ChatConfig, load: LoadTable) -> DataSource:
    """Returns the conversations of a table.

    Raises:
        ConfigError: A column is missing, or a conversation can't be used.
    """

    def read(split: str) -> tuple[list[Conversation], tuple[str, ...]]:
        table = load(split, lambda names, place: _choose_columns(config, names, place))
        columns = " and ".join(table.columns)
        conversations, notes = parse_rows(table, _read_row)
        return conversations, (f"Conversations of {split} are read from {columns}.", *notes)

    # Conversations with the same prompt go to the same split, so that validation repeats no prompt of training.
    conversations, notes = read("train")
    prompts = [_prompt_key(conversation) for conversation in conversations]
    by_prompt = len(set(prompts)) >= MIN_PROMPTS
    key = _prompt_key if by_prompt else _whole_key

    def check(split: str) -> Checked[Conversation]:
        found, notes = read(split)
        return Checked(items=found, keys=[key(one) for one in found], notes=notes)

    return build_source(
        Checked(items=conversations, keys=[key(one) for one in conversations], notes=notes),
        check,
        kind="conversations",
        given=config.given,
        describe=lambda train, _: [_describe(train)],
        same="prompt" if by_prompt else "content",
        max_examples=config.max_examples,
    )


def _describe(train: Checked[Conversation]) -> str:
    prompts = len(set(map(_prompt_key, train.items)))
    return f"train has {len(train.items)} conversations with {prompts} different prompts."


def _prompt_key(messages: Conversation) -> int:
    """Returns the content key of the messages before the assistant's first answer."""
    first = next(n for n, message in enumerate(messages) if message.role == "assistant")
    return _whole_key(messages[:first])


def _whole_key(messages: Conversation) -> int:
    return content_key(text for message in messages for text in message)


def _choose_columns(config: ChatConfig, names: Sequence[str], place: str) -> list[str]:
    wanted = (("messages", config.messages), ("prompt", config.prompt), ("completion", config.completion))
    if columns := choose_columns(wanted, names, place):
        return columns
    for known in KNOWN_COLUMNS:
        if set(known) <= set(names):
            return list(known)
    raise ConfigError(
        f"{place} must have columns `prompt` and `completion`, or `messages`, but has {shorten(list(names), 400)}. "
        "Name yours by `data.prompt` and `data.completion`, or `data.messages`."
    )


def _read_row(*values: Any) -> Conversation:
    """Returns the messages of a row.

    A prompt or completion may itself be a list of messages, as in TRL's conversational format.
    """
    roles: Sequence[Role] = ("user", "assistant")
    messages: Conversation = []
    for role, value in zip(roles, values, strict=False):
        if isinstance(value, list):
            messages += [_read_message(message) for message in value]
        elif len(values) == 2:
            messages.append(Message(role, require_text(value)))
        else:
            raise ValueError(f"must have a list of messages, but has {shorten(value)}")
    if not messages or messages[-1].role != "assistant":
        raise ValueError(f"must have messages that end with the assistant's, but has {shorten(values)}")
    return messages


def _read_message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"must have messages with `role` and `content`, but has {shorten(message)}")
    role = str(message.get("role", message.get("from")))
    if role not in ROLES:
        raise ValueError(f"must have messages of the roles {', '.join(get_args(Role))}, but has {shorten(role)}")
    return Message(ROLES[role], require_text(message.get("content", message.get("value"))))
