"""Reads pairs of answers to one prompt, of which one was preferred, in the forms of TRL and LLaMA-Factory."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lorasweep.config.data import AnswerScore
from lorasweep.data.reading.tables import choose_columns, open_tables, parse_rows
from lorasweep.data.source import DataSource, ReadExamples, build_source
from lorasweep.tasks.chat.read import (
    TOOLS_COLUMN,
    Conversation,
    get_content,
    hash_messages,
    parse_chat,
    parse_messages,
    prompt_key,
)
from lorasweep.tasks.preferences.settings import PreferencesConfig
from lorasweep.tasks.task import GivenTable, Recognised
from lorasweep.wording import join_words, shorten

PROMPT_COLUMNS = ("prompt", "question", "conversations")
"""Columns that are tried in this order if the user names no column of prompts."""


class Preference(NamedTuple):
    """Two conversations with the same prompt, whose last message is the preferred answer or the other one."""

    chosen: Conversation
    rejected: Conversation
    has_messages: bool = False
    """Whether the row has lists of messages, which only a chat template can write."""

    def replace_both(self, **values: Any) -> Preference:
        """Returns the pair with these fields of both conversations."""
        return self._replace(chosen=self.chosen._replace(**values), rejected=self.rejected._replace(**values))

    @property
    def group(self) -> str | None:
        return self.chosen.group

    def list_texts(self) -> Iterator[str]:
        yield from self.chosen.list_texts()
        yield from self.rejected.list_texts()


def read_preferences(config: PreferencesConfig) -> DataSource:
    """Returns the pairs of a table. Raises ConfigError if one can't be read, or a column is missing."""
    keeps_rows = isinstance(config.answers.score, AnswerScore)
    tables = open_tables(config, functools.partial(_choose_columns, config), keeps_rows=keeps_rows)

    def read(split: str) -> ReadExamples[Preference]:
        table, source = tables.pop(split), config.sources[split]
        parsed, notes = parse_rows(table, functools.partial(_parse_pair, columns=table.columns))
        pairs = [pair.replace_both(number=number, source=source) for number, pair in enumerate(parsed, start=1)]
        return pairs, [f"Pairs of {split} are read from {join_words(table.columns)}.", *notes]

    train = read("train")
    return build_source(
        train,
        read,
        missing=config.choose_split_percents(len(train[0])),
        key=lambda pair: prompt_key(pair.chosen),
        describe=lambda train, _: [
            f"train has {len(train)} pairs with {len({prompt_key(pair.chosen) for pair in train})} different prompts."
        ],
        shared="prompt",
        max_examples=config.max_examples,
    )


def _choose_columns(config: PreferencesConfig, names: Sequence[str], source: str) -> list[str]:
    prompt = config.prompt or next((name for name in PROMPT_COLUMNS if name in names), None)
    tools = TOOLS_COLUMN if TOOLS_COLUMN in names else None
    wanted = ("prompt", prompt), ("chosen", config.chosen), ("rejected", config.rejected), ("tools", tools)
    return choose_columns(wanted, names, source)


def _parse_pair(*values: Any, columns: Sequence[str], **of_row: Any) -> Preference:
    """Returns the conversations of a row."""
    tools = values[-1:] if columns[-1] == TOOLS_COLUMN else ()
    *prompt, chosen, rejected = values[: len(values) - len(tools)]
    # LLaMA-Factory has a message as an answer, not a list of messages
    chosen, rejected = ([answer] if isinstance(answer, dict) else answer for answer in (chosen, rejected))
    if _is_empty(chosen) or _is_empty(rejected):
        raise ValueError("must have two answers, but one is empty")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise ValueError("must have two texts or two lists of messages as answers, but has one of each")
    if not prompt and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_texts(chosen, rejected)
        if not (chosen.strip() and rejected.strip()):
            raise ValueError("must have two answers, but one is empty")
    given = parse_messages(prompt[0], "user") if prompt else []
    sides: list[Conversation] = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        try:
            # a list of messages may be the whole conversation
            is_answer = parse_messages(answer, "assistant")[0].role in ("assistant", "tool")
            parts = [*prompt, answer] if is_answer else [answer]
            side = parse_chat(*parts, *tools, has_tools=bool(tools), **of_row)
            if given and hash_messages(side.messages[:-1][-len(given) :]) != hash_messages(given):
                raise ValueError("must have a conversation that continues the prompt, but has other messages there")
        except ValueError as error:
            raise ValueError(f"{error} in `{name}`") from error
        sides.append(side)
    messages, others = (side.messages for side in sides)
    if messages[:-1] != others[:-1] or len(messages) == 1:
        raise ValueError("must have answers to one prompt, but has none, or their messages differ before the last")
    if any(first.role == second.role != "tool" for first, second in itertools.pairwise(messages)):
        raise ValueError(f"must have roles that alternate, but has {shorten([message.role for message in messages])}")
    if messages == others:
        raise ValueError("must have two different answers, but they are equal")
    return Preference(sides[0], sides[1], has_messages=any(isinstance(value, list) for value in (*prompt, chosen)))


def recognise_pairs(table: GivenTable) -> Recognised | None:
    """Returns the columns of pairs of answers; None if the table lacks those of the answers."""
    answers = [table.settings.get(f"data.{key}", key) for key in ("chosen", "rejected")]
    prompts = [table.settings["data.prompt"]] if "data.prompt" in table.settings else PROMPT_COLUMNS
    columns = [*prompts, *answers, TOOLS_COLUMN, table.settings.get("data.group")]
    return Recognised(columns=columns, texts=answers) if set(answers) <= table.columns.keys() else None


def _split_texts(chosen: str, rejected: str) -> tuple[list[str], str, str]:
    """Returns the whole words that two texts begin with, as the prompt, and the rest of each with its white space.

    TRL also ends the prompt within a word, if both answers begin with the same letters.
    """
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (these are no paths)
    prompt, *last_word = f"{shared}_".rsplit(maxsplit=1)  # the last word may differ
    if not last_word:
        raise ValueError("must have a prompt, or texts that begin with the same words, but has neither")
    return [prompt], chosen[len(prompt) :], rejected[len(prompt) :]


def _is_empty(answer: Any) -> bool:
    last = answer[-1] if isinstance(answer, list) and answer else answer
    content = (last.get("tool_calls") or get_content(last)) if isinstance(last, dict) else last
    return not content or (isinstance(content, str) and not content.strip())
