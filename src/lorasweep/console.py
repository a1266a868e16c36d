"""Output on the terminal. Text from files may contain control characters, which are printed as escapes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
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


def show(renderable: RenderableType) -> None:
    """Prints a table or texts on standard output. Only a text that forbids it is not wrapped."""
    EscapingConsole().print(renderable, crop=False)


@contextmanager
def reserve_stdout() -> Iterator[TextIO]:
    """Yields standard output, while everything that is printed goes to standard error, also from other processes."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as stdout, redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        try:
            yield stdout
        finally:
            os.dup2(stdout.fileno(), 1)


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints a text, on standard output unless another file is given."""
    print(_escape_controls(text), file=file or sys.stdout, flush=True)


def say_error(text: str) -> None:
    """Prints a sentence on standard error in one line."""
    say(f"lorasweep: {' '.join(text.splitlines())[:MAX_ERROR_CHARACTERS]}", file=sys.stderr)


def _escape_controls(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
