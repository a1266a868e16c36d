"""Renders conversations with a chat template as a server does, and separates each answer from its prompt."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import os
import re
import resource
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lorasweep.config.data import ChatConfig
from lorasweep.data.source import Conversation
from lorasweep.errors import ConfigError, first_line
from lorasweep.wording import shorten

MAX_RENDER_S = 5.0
"""Maximum number of seconds in which a template must render all answers of a conversation. It takes milliseconds."""
MAX_RENDER_BYTES = 2**29
"""Maximum memory that a template may take. One line of it can multiply a text to any length."""
STATM_FILE = Path("/proc/self/statm")
"""The process's memory in pages; its first number is the address space."""
OPEN_THINKING = re.compile(r"<think>\s*\Z")
"""The end of a generation prompt after which the model has to reason."""
GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")
"""The block of a template around the text that the assistant generates."""

ChatMessage = dict[str, Any]


class Turn(NamedTuple):
    """One answer of a conversation with its prompt."""

    prompt: str
    """The text that a server gives to the model."""
    answer: list[tuple[str, bool]]
    """The texts that the model generates after the prompt, up to its end-of-turn token; and whether each is scored."""
    omits_reasoning: bool
    """Whether the template leaves out the reasoning that the message has."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatTemplate:
    """A chat template with its variables."""

    tokenizer: PreTrainedTokenizerBase
    text: str | None
    """The text of the template; None for the tokenizer's own."""
    arguments: Mapping[str, Any]
    today: date

    def render_turns(self, conversation: Conversation, *, only_last: bool) -> list[Turn]:
        """Returns the answers of a conversation in order, or only the last one.

        Raises:
            ConfigError: The template fails or takes too long, leaves out an answer, or contradicts its own prompt.
        """
        messages = [
            {"role": m.role, "content": m.content, **json.loads(m.fields or "{}")} for m in conversation.messages
        ]
        tools = json.loads(conversation.tools) if conversation.tools else None
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            with _limit_costs(seconds=MAX_RENDER_S, num_bytes=MAX_RENDER_BYTES):
                return [self._render_turn(messages[: n + 1], tools) for n in (answers[-1:] if only_last else answers)]
        except ConfigError:
            raise
        except Exception as error:  # a jinja template can raise any class of error
            said = shorten(next((message["content"] for message in messages if message["role"] == "user"), ""))
            line = getattr(error, "lineno", None)  # only errors of syntax have it, which no conversation causes
            where = f"in its line {line}" if line else f"where the user begins with {said}"
            raise ConfigError(
                f"the chat template must accept each conversation, but fails ({first_line(error)}) {where}. "
                "Correct it, or use another `data.template` or `data.template=plain`."
            ) from error

    def _render_turn(self, messages: list[ChatMessage], tools: list[Any] | None) -> Turn:
        prompt, _ = self._render(messages[:-1], tools, add_generation_prompt=True)
        full, marks = self._render(messages, tools, add_generation_prompt=False)
        kept = full.removesuffix(str(self.tokenizer.eos_token or ""))
        if kept != full and kept.rstrip().endswith(self._special_tokens):
            # Phi's template writes the end-of-text token after the last turn, in place of a generation prompt.
            continued, _ = self._render(messages, tools, add_generation_prompt=True)
            full = kept if continued.startswith(kept) and not continued.startswith(full) else full
        start, opening = self._find_answer(prompt, full, messages[-1])
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
        return Turn(prompt, answer, omits_reasoning=_get_reasoning(messages[-1]) not in "".join(texts))

    def _find_answer(self, prompt: str, full: str, message: ChatMessage) -> tuple[int, str]:
        """Returns where in the whole text the answer starts, and what the model generates before it.

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

    def _render(
        self, messages: list[ChatMessage], tools: list[Any] | None, *, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Returns the text, and where the template marks what the assistant generates; None if it has no marks."""
        template = self.tokenizer.get_chat_template(self.text, tools=tools)
        _compile_jinja_template(template).globals["strftime_now"] = self.today.strftime
        has_marks = GENERATION_BLOCK.search(template) is not None
        arguments: dict[str, Any] = {
            "tools": tools,
            "chat_template": template,
            "return_assistant_tokens_mask": has_marks,
            "add_generation_prompt": add_generation_prompt,
            **self.tokenizer.special_tokens_map,
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


def read_template(config: ChatConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Returns the template of the settings; None for `plain`, and for `auto` if the tokenizer has no template.

    Raises ConfigError if the template's file can't be read, or the tokenizer has no template.
    """
    text = None
    if config.template.endswith(".jinja"):
        try:
            text = Path(config.template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"`data.template` must name a readable file, but got {config.template!r}: {first_line(error)}."
            ) from error
    elif config.template == "plain" or (config.template == "auto" and tokenizer.chat_template is None):
        return None
    elif tokenizer.chat_template is None:
        raise ConfigError(
            "`data.template=model` needs a tokenizer with a chat template, but this model's tokenizer has none. "
            "Use `data.template=plain`, or a file."
        )
    today = date.fromisoformat(config.template_date)
    return ChatTemplate(tokenizer=tokenizer, text=text, arguments=config.template_arguments, today=today)


def digest_template(template: ChatTemplate) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a template's text, as in a run's record."""
    text = template.text or template.tokenizer.chat_template
    return hashlib.sha256(str(text).encode()).hexdigest()[:16]


def _get_reasoning(message: ChatMessage) -> str:
    """Returns the reasoning of a message: its own field, or the start of its text up to `</think>`."""
    inline = message["content"].rpartition("</think>")[0].replace("<think>", "")
    return str(message.get("reasoning_content", inline)).strip()


@contextmanager
def _limit_costs(*, seconds: float, num_bytes: int) -> Iterator[None]:
    """Raises TimeoutError or MemoryError in the block if it takes more time, or more memory than the process has now.

    Only the main thread gets signals, and the limit of memory is that of the whole process: others have no limits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    old_limits = resource.getrlimit(resource.RLIMIT_AS)
    if old_limits[0] == resource.RLIM_INFINITY and STATM_FILE.exists():  # Linux
        pages = int(STATM_FILE.read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, old_limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old_limits)
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
