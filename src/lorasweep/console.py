"""Output on the terminal. Text from files may contain control characters, which are printed as escapes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

MAX_ERROR_CHARACTERS = 4000
"""Maximum length of an error message. Longer messages are cut, because they may quote very long values."""


class EscapingConsole(Console):
    """A rich console that prints texts as they are: no markup or emoji codes, and control characters as escapes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(_escape_controls(text), style)


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints a text, on standard output unless another file is given."""
    print(_escape_controls(text), file=file or sys.stdout, flush=True)


def say_error(text: str) -> None:
    """Prints a sentence on standard error in one line."""
    say(f"lorasweep: {' '.join(text.splitlines())[:MAX_ERROR_CHARACTERS]}", file=sys.stderr)


def _escape_controls(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
