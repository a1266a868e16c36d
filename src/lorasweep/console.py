"""Output on the terminal. Text from files may contain control characters, which are printed as escapes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lorasweep.wording import format_seconds

MAX_ERROR_CHARACTERS = 4000
"""Maximum length of an error message. Longer messages are cut, because they may quote very long values."""

MAX_SILENCE_S = 4.0
"""Seconds without output after which a line says what the command does."""
MAX_PIPE_SILENCE_S = 25.0
"""Maximum seconds between two of these lines without a terminal. The pause doubles up to it, to keep logs short."""
MIN_PREDICTED_S = 2.0
"""The time left is estimated after this time in seconds, because the first step warms up."""
PROCESS_BEGAN_S = time.monotonic()
"""The one clock of all lines on progress: a process runs one command."""
ERASE_LINE = "\r\x1b[2K"


@dataclass(kw_only=True)
class RunningTraining:
    """How far the pack, or the run alone, is that this process trains now. Another thread shows it."""

    phase: str = ""
    step: int = 0
    num_steps: int = 0
    first_step: int = 0
    """The step at which it began or was resumed."""
    began_s: float = 0.0
    text: str = ""
    """What is shown instead during a sweep."""

    def note(self, phase: str, step: int, num_steps: int) -> None:
        """Takes the phase and the steps done so far, as `training.progress.OnPhase`."""
        if step < self.step or num_steps != self.num_steps:  # another training
            self.first_step, self.began_s = step, time.monotonic()
        self.phase, self.step, self.num_steps = phase, step, num_steps

    def describe(self) -> str:
        """Returns `training, step 24 of 60, about 1 min 28 s left`; empty if nothing trains."""
        if self.text:
            return self.text
        if self.phase == "saving" and self.step >= self.num_steps:
            return ""
        seconds, done = time.monotonic() - self.began_s, self.step - self.first_step
        parts = [f"{self.phase}, step {self.step:,} of {self.num_steps:,}"] if self.num_steps else []
        if done > 0 and seconds >= MIN_PREDICTED_S:
            parts.append(f"about {format_seconds(seconds * (self.num_steps - self.step) / done)} left")
        return ", ".join(parts)


RUNNING_TRAINING = RunningTraining()
"""The training of this process, which trains one pack or one run at a time."""


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


class WatchedStream:
    """A stream that calls a function before it writes."""

    def __init__(self, stream: TextIO, before_write: Callable[[], None]) -> None:
        self._stream, self._before_write = stream, before_write

    def write(self, text: str) -> int:
        self._before_write()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def show_heartbeat(command: str) -> Iterator[None]:
    """Says on standard error what a command does inside the block, while it prints nothing."""
    stream, pause_s, is_shown = sys.stderr, MAX_SILENCE_S, False
    printed_s = time.monotonic()

    def beat() -> None:
        nonlocal pause_s, printed_s, is_shown
        now = time.monotonic()
        if now - printed_s < pause_s:
            return
        line = _escape_controls(add_clock(RUNNING_TRAINING.describe() or f"{command} is at work"))
        with suppress(OSError, ValueError):  # who reads the output has ended
            if stream.isatty():  # one line that changes
                stream.write(ERASE_LINE + line[: os.get_terminal_size(stream.fileno()).columns - 1])
                is_shown = True
            else:
                stream.write(f"{line}\n")
                printed_s, pause_s = now, min(2 * pause_s, MAX_PIPE_SILENCE_S)
            stream.flush()

    def note_output() -> None:
        nonlocal printed_s, is_shown
        printed_s = time.monotonic()
        if is_shown:
            stream.write(ERASE_LINE)
            is_shown = False

    def note_message() -> None:
        nonlocal pause_s
        note_output()
        pause_s = MAX_SILENCE_S  # what a message announces begins now

    out, err = WatchedStream(sys.stdout, note_output), WatchedStream(sys.stderr, note_message)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            with repeat_every(1.0, beat):
                yield
        finally:
            note_output()


@contextmanager
def repeat_every(seconds: float, call: Callable[[], None], *, also_at_end: bool = False) -> Iterator[None]:
    """Calls a function in a thread every `seconds` while the block runs, and with `also_at_end` once after it."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            call()
        if also_at_end:
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def add_clock(text: str) -> str:
    """Returns `  9 s: text`, with the seconds since the command began."""
    return f"{time.monotonic() - PROCESS_BEGAN_S:3.0f} s: {text}"


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints a text, on standard output unless another file is given."""
    print(_escape_controls(text), file=file or sys.stdout, flush=True)


def say_note(text: str) -> None:
    """Prints a text on standard error, beside the results on standard output."""
    say(text, file=sys.stderr)


def say_error(text: str) -> None:
    """Prints a sentence on standard error in one line."""
    say(f"lorasweep: {' '.join(text.splitlines())[:MAX_ERROR_CHARACTERS]}", file=sys.stderr)


def _escape_controls(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
