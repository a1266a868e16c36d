"""Renders the answers of a conversation with a chat template, in transformers' sandbox."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")
"""The block of a template around the text that the assistant generates."""


class Rendering(NamedTuple):
    """The texts of one answer."""

    prompt: str
    """The text up to the answer, with a generation prompt."""
    full: str
    """The text with the answer."""
    marks: list[tuple[int, int]] | None
    """Where the template marks parts of `full` as generated: first character and last + 1. None if it marks nothing."""


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """The text of a chat template with everything that it gets beside a conversation."""

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
        """Returns the text, and where the template marks what the assistant generates; None if it has no marks."""
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
