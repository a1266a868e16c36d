"""What goes to the terminal: every character of a name is seen there and none is obeyed. Used by `cli` alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lorasweep.wording import shorten, visible


class PlainConsole(Console):
    """A console that obeys its own styles and tables, but no control character in what it is given to show."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Called by rich for whatever is printed, at every level of it."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(visible(text, keep="\n"), style)


def say(text: str, *, file: TextIO | None = None, keep: str = "\n") -> None:
    """Prints a text, at once; names in it may come from anyone.

    Args:
        text: One or several lines.
        file: Standard output, unless another is given.
        keep: Unseen characters to leave as they are.
    """
    print(visible(text, keep=keep), file=file or sys.stdout, flush=True)


def say_error(text: str) -> None:
    """Prints one sentence on standard error, in one line and of a length that can be read."""
    say(f"lorasweep: {shorten(' '.join(text.splitlines()))}", file=sys.stderr, keep="")


@contextmanager
def threads_leave_file_errors() -> Iterator[None]:
    """Silences threads that can't write a file: TensorBoard's would print a traceback beside the error's sentence."""
    before = threading.excepthook

    def quiet(what: threading.ExceptHookArgs) -> None:
        if not issubclass(what.exc_type, OSError):
            before(what)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = before
