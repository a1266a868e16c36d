"""Renders conversations with a chat template as a server does, and separates each answer from its prompt."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lorasweep.data.tokenise import read_template_file
from lorasweep.errors import ConfigError, first_line
from lorasweep.tasks.chat.read import Conversation
from lorasweep.tasks.chat.settings import ConversationSettings
from lorasweep.wording import shorten

OPEN_THINKING = re.compile(r"<think>\s*\Z")
"""The end of a generation prompt after which the model has to reason."""
GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")
"""The block of a template around the text that the assistant generates."""


class Rendering(NamedTuple):
    """The texts of one answer."""

    prompt: str
    """The text up to the answer, with a generation prompt."""
    full: str
    """The text with the answer."""
    marks: list[tuple[int, int]] | None
    """Parts of `full` that the template marks as generated: first, last + 1. None without `GENERATION_BLOCK`."""


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """A chat template with everything that it gets in addition to a conversation."""

    text: str
    arguments: Mapping[str, Any]
    today: str
    """The day that the template gets as today, as YEAR-MONTH-DAY."""
    eos_token: str
    special_tokens: tuple[str, ...]

    def render(
        self, messages: Sequence[dict[str, Any]], *, tools: list[Any] | None, answers: Sequence[int]
    ) -> list[Rendering]:
        """Returns a rendering of each answer, given by its index. A template can raise any class of error."""
        renderings: list[Rendering] = []
        for index in answers:
            told = list(messages[: index + 1])
            prompt, _ = self._render_one(told[:-1], tools, has_prompt=True)
            full, marks = self._render_one(told, tools, has_prompt=False)
            kept = full.removesuffix(self.eos_token)
            if kept != full and kept.rstrip().endswith(self.special_tokens):
                # Phi's template writes the end-of-text token after the last turn, in place of a generation prompt.
                continued, _ = self._render_one(told, tools, has_prompt=True)
                full = kept if continued.startswith(kept) and not continued.startswith(full) else full
            renderings.append(Rendering(prompt, full, marks))
        return renderings

    def _render_one(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, has_prompt: bool
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Returns the text, and the `marks` of a `Rendering`."""
        _compile_jinja_template(self.text).globals["strftime_now"] = date.fromisoformat(self.today).strftime
        has_marks = GENERATION_BLOCK.search(self.text) is not None
        arguments: dict[str, Any] = {
            "tools": tools,
            "chat_template": self.text,
            "return_assistant_tokens_mask": has_marks,
            "add_generation_prompt": has_prompt,
            **self.arguments,
        }
        rendered: Any  # transformers wrongly declares `str`
        try:
            rendered = render_jinja_template([messages], **arguments)
        except TypeError:  # DeepSeek's template joins texts, so it needs the arguments of tool calls as JSON text
            messages = copy.deepcopy(messages)
            for function in (call["function"] for message in messages for call in message.get("tool_calls", ())):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            rendered = render_jinja_template([messages], **arguments)
        return rendered[0][0], rendered[1][0] if has_marks else None


class Turn(NamedTuple):
    """One answer of a conversation with its prompt."""

    prompt: str
    """The text that a server gives to the model."""
    answer: list[tuple[str, bool]]
    """The texts that the model generates after the prompt, up to its end-of-turn token; and whether each is scored."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatTemplate:
    """A chat template with its variables."""

    tokenizer: PreTrainedTokenizerBase
    text: str | None
    """The text of the template; None for the tokenizer's own."""
    arguments: Mapping[str, Any]
    today: str
    """The day that the template gets as today, as YEAR-MONTH-DAY."""

    def render_turns(self, conversations: Sequence[Conversation], *, only_last: bool) -> Iterator[list[Turn]]:
        """Yields for each conversation its trained answers in order, or only the last one.

        Raises:
            ConfigError: The template fails, leaves out an answer, or contradicts its own prompt.
        """
        for conversation in conversations:
            try:
                yield self._render_conversation(conversation, only_last=only_last)
            except ConfigError as error:
                row = f"row {conversation.number} of {conversation.source!r}"
                raise ConfigError(f"{error} It is {row}, which you may also remove.") from error

    def _render_conversation(self, conversation: Conversation, *, only_last: bool) -> list[Turn]:
        messages = [
            {"role": m.role, "content": m.content, **json.loads(m.fields or "{}")} for m in conversation.messages
        ]
        for message in messages:
            message.pop("weight", None)  # no server knows it
        answers = [index for index, message in enumerate(conversation.messages) if message.is_trained]
        answers = answers[-1:] if only_last else answers
        try:
            renderer = self._with_tools if conversation.tools else self._without_tools
            tools = json.loads(conversation.tools) if conversation.tools else None
            renderings = renderer.render(messages, tools=tools, answers=answers)
        except Exception as error:  # a template can raise any class of error
            place = f" in its line {error.lineno}" if hasattr(error, "lineno") else ""
            said = next((message["content"] for message in messages if message["role"] == "user"), "")
            raise ConfigError(
                f"the chat template must accept each conversation, but fails ({first_line(error)}{place}) where the "
                f"user begins with {shorten(said)}. Correct it, or use another `data.template`, such as `plain`."
            ) from error
        return [self._build_turn(messages[index], made) for index, made in zip(answers, renderings, strict=True)]

    def _build_renderer(self, *, has_tools: bool) -> Renderer:
        return Renderer(
            text=self.tokenizer.get_chat_template(self.text, tools=[{}] if has_tools else None),
            arguments={**self.tokenizer.special_tokens_map, **self.arguments},
            today=self.today,
            eos_token=str(self.tokenizer.eos_token or ""),
            special_tokens=self._special_tokens,
        )

    @functools.cached_property
    def _with_tools(self) -> Renderer:
        return self._build_renderer(has_tools=True)

    @functools.cached_property
    def _without_tools(self) -> Renderer:
        return self._build_renderer(has_tools=False)

    def _build_turn(self, message: Mapping[str, Any], rendering: Rendering) -> Turn:
        prompt, full, marks = rendering
        start, opening = self._find_answer(prompt, full, message)
        # A server stops at the end-of-turn token: a line break after it belongs to the next prompt.
        end, end_token = len(full.rstrip()), ""
        if not full[:end].endswith(self._special_tokens):
            end, end_token = len(full), str(self.tokenizer.eos_token or "")
        spans = [(max(first, start), last) for first, last in marks or [] if last > start]
        if spans or marks is None:
            spans[-1:] = [((spans or [(start, end)])[-1][0], end)]  # the end-of-turn token is scored with the last mark
        borders = [start, *(border for span in spans for border in span), end]
        texts = [full[first:last] for first, last in itertools.pairwise(borders)]  # every second one is scored
        texts[1 if spans else 0] = opening + texts[1 if spans else 0]
        texts[-2 if spans else 0] += end_token
        answer = [(text, index % 2 == 1) for index, text in enumerate(texts) if text]
        return Turn(prompt, answer)

    def _find_answer(self, prompt: str, full: str, message: Mapping[str, Any]) -> tuple[int, str]:
        """Returns the index in `full` at which the answer starts, and what the model generates before that text.

        Raises:
            ConfigError: The whole text does not continue the prompt, or lacks the message.
        """
        start = len(os.path.commonprefix([prompt, full]))  # noqa: RUF071 (these are no paths)
        opening = ""
        if full.startswith(prompt.rstrip()):
            # Nemotron's prompt ends with `<think>` and a line break, but answers without reasoning have
            # `<think></think>`. So the prompt keeps its line break, and the model generates `</think>`.
            pass
        elif (opened := OPEN_THINKING.search(prompt)) and full.startswith(prompt[: opened.start()]):
            # DeepSeek's prompt opens a block of reasoning that its template leaves out of answers.
            start = opened.start()
            if "</think>" not in full[start:]:
                opening = f"{_get_reasoning(message)}\n</think>\n\n"
        else:
            shown, other = (shorten(text[max(start - 20, 0) :], 80) for text in (prompt, full))
            raise ConfigError(
                "the chat template's text with an answer must continue its generation prompt, but the prompt has "
                f"{shown} and the text {other}. Set `data.template_arguments`, such as {{enable_thinking: true}} for "
                "answers with reasoning, or use another `data.template`."
            )
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        for part in (message["content"].rpartition("</think>")[2].strip(), *calls):
            if part not in full[start:]:
                raise ConfigError(
                    f"the chat template must write each answer and tool call, but instead of {shorten(part)} it writes "
                    f"{shorten(full[start:], 80)}. Use a `data.template` that writes it."
                )
        return start, opening

    @functools.cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return (*self.tokenizer.all_special_tokens, *added)


def read_template(config: ConversationSettings, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Returns the template of the settings; None for `plain`, and for `auto` if the tokenizer has no template.

    Raises ConfigError if the file can't be read, an argument is reserved, or `model` is set and there is no template.
    """
    text = None
    if config.template_file is not None:
        text = read_template_file(config.template_file)
    elif config.template == "plain" or (config.template == "auto" and tokenizer.chat_template is None):
        return None
    elif tokenizer.chat_template is None:
        raise ConfigError(
            "`data.template=model` needs a tokenizer with a chat template, but this model's tokenizer has none. "
            "Use `data.template=plain`, or a file."
        )
    given = {"messages", *tokenizer.special_tokens_map, *inspect.signature(tokenizer.apply_chat_template).parameters}
    if reserved := sorted(config.template_arguments.keys() & given):
        raise ConfigError(
            "`data.template_arguments` must be variables of the template alone, but lorasweep or the tokenizer gives "
            f"`{reserved[0]}` to it. Remove it."
        )
    arguments, today = config.template_arguments, config.template_date
    return ChatTemplate(tokenizer=tokenizer, text=text, arguments=arguments, today=today)


def _get_reasoning(message: Mapping[str, Any]) -> str:
    """Returns the reasoning of a message: its own field, or the start of its text up to `</think>`."""
    inline = message["content"].rpartition("</think>")[0].replace("<think>", "")
    return str(message.get("reasoning_content", inline)).strip()
