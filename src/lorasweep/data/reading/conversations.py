"""Conversations, from columns of prompts and completions or of lists of messages. Comes after `tables`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lorasweep.config.data import ChatConfig
from lorasweep.data.reading.assembly import Checked, Form, assemble, keep_usable
from lorasweep.data.reading.labelled import Tables, row_limits
from lorasweep.data.reading.splitting import content_key
from lorasweep.data.reading.tables import Table, require_column
from lorasweep.data.source import Conversations, DataSource, Message, Role, fingerprint_conversations
from lorasweep.errors import ConfigError

KNOWN_COLUMNS: Sequence[tuple[str, ...]] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
"""Looked for in this order where no column is named."""
ROLES: Mapping[str, Role] = {
    **{role: role for role in get_args(Role)},
    "human": "user",
    "gpt": "assistant",
}
"""Names of roles, those of ShareGPT's files included."""
FEW_PROMPTS = 20
"""With fewer different prompts than this, rows are split by their whole content and not by the prompt alone."""

Conversation = list[Message]


def read_conversations(config: ChatConfig, tables: Tables) -> DataSource:
    """Returns the conversations of a table.

    Raises:
        ConfigError: A column is missing, or a conversation can't be used.
    """

    def load(split: str) -> Table:
        return tables.load(split, lambda names, place: _choose_columns(config, names, place))

    def read(split: str) -> Checked[Conversation]:
        rows, notes = _check(load(split))
        return Checked(rows=rows, keys=list(map(key, rows)), notes=notes)

    rows, notes = _check(load("train"))
    prompts = list(map(prompt_key, rows))
    by_prompt = len(set(prompts)) >= FEW_PROMPTS
    key = prompt_key if by_prompt else whole_key
    return assemble(
        Form(
            kind="conversations",
            label_names=(),
            train=Checked(rows=rows, keys=prompts if by_prompt else list(map(key, rows)), notes=notes),
            read=read,
            given=tables.given,
            pieces={},
            same="prompt" if by_prompt else "content",
            limits=row_limits(config),
            build=_build,
            describe=_describe,
        )
    )


def prompt_key(messages: Conversation) -> int:
    """Returns the content key of what comes before the assistant's first answer."""
    first = next(n for n, message in enumerate(messages) if message.role == "assistant")
    return whole_key(messages[:first])


def whole_key(messages: Conversation) -> int:
    """Returns the content key of all roles and texts."""
    return content_key(text for message in messages for text in (message.role, message.content))


def _choose_columns(config: ChatConfig, names: Sequence[str], place: str) -> list[str]:
    wanted = [("messages", config.messages), ("prompt", config.prompt), ("completion", config.completion)]
    columns = [require_column(name, names, key=f"data.{key}", place=place) for key, name in wanted if name is not None]
    if columns:
        return columns
    for known in KNOWN_COLUMNS:
        if set(known) <= set(names):
            return list(known)
    shown = [name if len(name) <= 30 else f"{name[:30]}..." for name in names[:12]]
    raise ConfigError(
        f"{place} must have columns `prompt` and `completion`, or `messages`, but has {shown!r}. "
        "Name yours by `data.prompt` and `data.completion`, or `data.messages`."
    )


def _check(table: Table) -> tuple[list[Conversation], tuple[str, ...]]:
    columns = list(table.columns)
    found = [_read_row(columns, values) for values in zip(*table.columns.values(), strict=True)]
    usable = keep_usable(table, [row if isinstance(row, str) else None for row in found])
    rows = [row for row in found if not isinstance(row, str)]
    return rows, (f"Conversations are read from {' and '.join(columns)}.", *usable.notes)


def _read_row(columns: Sequence[str], values: Sequence[Any]) -> Conversation | str:
    """Returns the messages of a row, or what it must have and doesn't."""
    messages: Conversation = []
    sides: Sequence[Role | None] = (None,) if len(columns) == 1 else ("user", "assistant")
    for column, value, side in zip(columns, values, sides, strict=True):
        said = [{"role": side, "content": value}] if side is not None and not isinstance(value, list) else value
        if not isinstance(said, list):
            return f"must have a list of messages in column {column!r}, but has {repr(value)[:40]}."
        for message in said:
            read = _read_message(message, column=column)
            if isinstance(read, str):
                return read
            messages.append(read)
    if not messages or messages[-1].role != "assistant":
        said = " and ".join(map(repr, columns))
        roles = ", ".join(message.role for message in messages) or "none"
        return f"must have messages in {said} that end with the assistant's, but has {roles}."
    return messages


def _read_message(message: Any, *, column: str) -> Message | str:
    if not isinstance(message, dict):
        return f"must have messages with `role` and `content` in column {column!r}, but has {repr(message)[:40]}."
    role = ROLES.get(str(message.get("role", message.get("from"))))
    content = message.get("content", message.get("value"))
    if role is None:
        return (
            f"must have the roles {', '.join(get_args(Role))} in column {column!r}, "
            f"but has {repr(message.get('role', message.get('from')))[:40]}."
        )
    if not isinstance(content, str):
        return f"must have a text as {role}'s content in column {column!r}, but has {repr(content)[:40]}."
    if not content.strip():
        return f"must have a text as {role}'s content in column {column!r}, but it is empty."
    return Message(role=role, content=content)


def _build(name: str, rows: list[Conversation], notes: tuple[str, ...]) -> Conversations:
    return Conversations(name=name, conversations=rows, fingerprint=fingerprint_conversations(rows), notes=notes)


def _describe(train: Checked[Conversation], validation: Checked[Conversation]) -> list[str]:
    prompts = len(set(map(prompt_key, train.rows)))
    return [f"train has {len(train.rows)} conversations with {prompts} different prompts."]
