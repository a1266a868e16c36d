"""Reads conversations from columns of prompts and completions, or from lists of messages."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple, get_args

from lorasweep.config.data import AnswerScore
from lorasweep.data.reading.tables import choose_columns, open_tables, parse_rows, require_text
from lorasweep.data.source import DataSource, ReadExamples, build_source, content_key
from lorasweep.errors import ConfigError
from lorasweep.tasks.chat.settings import ChatConfig
from lorasweep.tasks.task import GivenTable, Recognised
from lorasweep.wording import shorten

Role = Literal["system", "developer", "user", "assistant", "tool"]
TOOLS_COLUMN = "tools"
"""Column with the schemas of the tools that a conversation may call."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that may have the assistant's reasoning. Templates get the first of these names."""
KNOWN_COLUMNS = (
    "messages",
    "conversations",
    "prompt completion",
    "prompt response",
    "question answer",
    "instruction input output",
    "instruction output",
)
"""Columns that are tried in this order if the user names none."""
ROLES: Mapping[str, Role] = {**{role: role for role in get_args(Role)}, "human": "user", "gpt": "assistant"}
"""Our role for each role name in a file. ShareGPT's files have `human` and `gpt`."""
MIN_PROMPTS = 20
"""With fewer different prompts, the whole conversation decides its split, not the prompt."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: Role
    content: str
    fields: str = ""
    """A JSON object with `tool_calls`, `reasoning_content`, `tool_call_id` and `name` if the message has them, and
    `weight` if it is 0."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The fields that are not empty. So a message without tools keeps its hash, and its split."""
        return self if self.fields else self[:2]

    @property
    def is_trained(self) -> bool:
        """Whether the model learns the message: it is the assistant's, and its weight is not 0."""
        return self.role == "assistant" and "weight" not in json.loads(self.fields or "{}")


class Conversation(NamedTuple):
    """Messages, the last one from the assistant and trained. A prompt with its completion has two messages."""

    messages: list[Message]
    group: str | None = None
    """Value of the column `data.group`, or a hash of the prompt; None if each conversation is a group."""
    tools: str = ""
    """A JSON list of the tools' schemas; empty if there are none."""
    row: Mapping[str, Any] | None = None
    """The row of the table by column; None unless the function of `data.answers.score` needs it."""
    number: int = 0
    """Its place in `source`, from 1 on, for errors."""
    source: str = ""

    def list_texts(self) -> Iterator[str]:
        yield str(len(self.messages))  # keeps two conversations apart from one long one
        for message in self.messages:
            yield from message.texts
        if self.tools:
            yield self.tools


def read_conversations(config: ChatConfig) -> DataSource:
    """Returns the conversations of a table. Raises ConfigError if one can't be used, or a column is missing."""
    keeps_rows = isinstance(config.answers.score, AnswerScore)
    tables = open_tables(config, functools.partial(_choose_columns, config), keeps_rows=keeps_rows)

    def read(split: str) -> ReadExamples[Conversation]:
        table = tables.pop(split)
        items, notes = parse_rows(table, functools.partial(parse_chat, has_tools=TOOLS_COLUMN in table.columns))
        items = [
            item._replace(number=number, source=config.sources[split]) for number, item in enumerate(items, start=1)
        ]
        return items, [f"Conversations of {split} are read from {' and '.join(table.columns)}.", *notes]

    train = read("train")
    # Conversations with the same prompt go to the same split, so that validation repeats no prompt of training.
    is_split_by_prompt = len(set(map(prompt_key, train[0]))) >= MIN_PROMPTS
    return build_source(
        train,
        read,
        missing=config.choose_split_percents(len(train[0])),
        key=prompt_key if is_split_by_prompt else lambda conversation: hash_messages(conversation.messages),
        describe=lambda train, _: [
            f"train has {len(train)} conversations with {len(set(map(prompt_key, train)))} different prompts."
        ],
        shared="prompt" if is_split_by_prompt else "content",
        max_examples=config.max_examples,
    )


def _choose_columns(config: ChatConfig, names: Sequence[str], source: str) -> list[str]:
    wanted = (
        ("messages", config.messages),
        ("prompt", config.prompt),
        ("input", config.input),
        ("completion", config.completion),
    )
    tools = [TOOLS_COLUMN] if TOOLS_COLUMN in names else []
    if columns := choose_columns(wanted, names, source):
        return columns + tools
    for known in map(str.split, KNOWN_COLUMNS):
        if set(known) <= set(names):
            return [*known, *tools]
    raise ConfigError(
        f"{source} must have columns `prompt` and `completion`, or `messages`, but has {shorten(list(names), 400)}. "
        "Set `data.prompt` and `data.completion`, or `data.messages`, to its columns."
    )


def recognise_conversations(table: GivenTable) -> Recognised | None:
    """Returns the columns of conversations, which the user named or which have usual names; None without any."""
    keys = (f"data.{key}" for key in ("prompt", "input", "completion", "messages"))
    named = [table.settings[key] for key in keys if key in table.settings]
    usual = next((known.split() for known in KNOWN_COLUMNS if set(known.split()) <= table.columns.keys()), [])
    columns = [*(named or usual), TOOLS_COLUMN, table.settings.get("data.group")]
    return Recognised(columns=columns, texts=columns[:1]) if named or usual else None


def prompt_key(conversation: Conversation) -> int:
    """Returns the content key of the messages before the assistant's first answer."""
    return hash_messages(itertools.takewhile(lambda message: message.role != "assistant", conversation.messages))


def hash_messages(messages: Iterable[Message]) -> int:
    return content_key(text for message in messages for text in message.texts)


def parse_chat(*values: Any, group: str | None, has_tools: bool, row: Mapping[str, Any] | None = None) -> Conversation:
    """Returns the messages of a row. A prompt or completion may be a list of messages (TRL's conversational format)."""
    roles: Sequence[Role] = ("user", "assistant")
    texts = values[:-1] if has_tools else values
    if len(texts) == 3:  # a prompt, its input and the answer
        prompt, more, answer = texts
        texts = (f"{require_text(prompt)}\n{require_text(more)}" if more and str(more).strip() else prompt, answer)
    if len(texts) == 1 and not isinstance(texts[0], list):
        raise ValueError(f"must have a list of messages, but has {shorten(texts[0])}")
    messages = [message for role, text in zip(roles, texts, strict=False) for message in parse_messages(text, role)]
    if not messages or messages[-1].role != "assistant":
        roles_given = [message.role for message in messages]
        raise ValueError(f"must have messages that end with the assistant's, but has the roles {shorten(roles_given)}")
    num_open = 0  # tool calls without an answer
    for message in messages:
        if (message.role == "tool") != (num_open > 0):
            raise ValueError(
                "must have a message of the role tool right after each tool call and nowhere else, but has one of the "
                f"role {message.role} (open calls: {num_open})"
            )
        num_open += -1 if message.role == "tool" else len(json.loads(message.fields or "{}").get("tool_calls", ()))
    trained = [index for index, message in enumerate(messages) if message.is_trained]
    if not trained:
        raise ValueError("must have a message of the assistant whose weight is not 0, but has none")
    messages = messages[: trained[-1] + 1]  # nothing is learned from what follows the last trained answer
    tools = _parse_objects(values[-1], kind="tools") if has_tools else []
    conversation = Conversation(messages, group, json.dumps(tools) if tools else "", row)
    return conversation if group is not None else conversation._replace(group=f"{prompt_key(conversation):016x}")


def parse_messages(value: Any, role: Role) -> list[Message]:
    """Returns a list of messages, or a text as a message of this role. Raises ValueError if it is neither."""
    if not isinstance(value, list):
        return [Message(role, require_text(value))]
    messages: list[Message] = []
    for number, message in enumerate(value, start=1):
        try:
            messages.append(_parse_message(message))
        except ValueError as error:
            raise ValueError(f"{error} in message {number}") from error
    return messages


def _parse_message(message: Any) -> Message:
    if not isinstance(message, dict) or not (message.get("role") or message.get("from")):
        raise ValueError(f"must have messages with `role` and `content`, but has {shorten(message)}")
    # the reader may give every message the keys of all messages, with None for those that it lacks
    role = str(message.get("role") or message.get("from"))
    if role not in ROLES:
        raise ValueError(f"must have messages of the roles {', '.join(get_args(Role))}, but has {shorten(role)}")
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"must have messages of weight 0 (not trained) or 1, but has {shorten(weight)}")
    content = get_content(message)
    if ROLES[role] == "tool":
        named = {key: str(message[key]) for key in ("tool_call_id", "name") if message.get(key) is not None}
        return Message("tool", content if content == "" else require_text(content), json.dumps(named) if named else "")
    if ROLES[role] != "assistant":
        return Message(ROLES[role], require_text(content))
    fields: dict[str, Any] = {}
    if reasoning := next((message[key] for key in REASONING_KEYS if message.get(key)), None):
        fields["reasoning_content"] = require_text(reasoning)
    if calls := _parse_objects(message.get("tool_calls"), kind="tool_calls"):
        fields["tool_calls"] = [_parse_call(call) for call in calls]
    elif content is None or not str(content).strip():
        raise ValueError(f"must have a text or tool calls in each message of the assistant, but has {shorten(content)}")
    if weight == 0:
        fields["weight"] = 0
    # some templates fail without content, so a mere tool call has an empty one
    return Message("assistant", require_text(content) if content else "", json.dumps(fields) if fields else "")


def get_content(message: Mapping[str, Any]) -> Any:
    """Returns the content of a message, as one text if it is a list of texts (`{"type": "text", "text": ...}`)."""
    content = message["content"] if message.get("content") is not None else message.get("value")
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(map(str, texts)) if texts and len(texts) == len(parts) and None not in texts else content


def _parse_objects(value: Any, *, kind: str) -> list[dict[str, Any]]:
    """Returns a list of JSON objects, given as such or as JSON text. None counts as no object."""
    try:
        objects = json.loads(value) if isinstance(value, str) and value.strip() else _drop_nulls(value or [])
    except ValueError:  # no JSON
        objects = None
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise ValueError(f"must have a JSON list of objects as `{kind}`, but has {shorten(value)}")
    return objects


def _drop_nulls(value: Any) -> Any:
    """Returns a value without null entries: parquet files give each object the keys of all other objects."""
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _parse_call(call: dict[str, Any]) -> dict[str, Any]:
    """Returns a tool call as servers give it to templates: its function apart, the arguments as an object."""
    function: Any = call.get("function", call)
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    with suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments or {}
    if not name or not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f"must have tool calls with a `name` and an object of `arguments`, but has {shorten(call)}")
    identity = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}
