"""Shows a sweep while it runs: a live table in a terminal, plain lines in a notebook or a pipe, or a caller's function.

The sweep's record is read about once a second, so it does not matter which process trains.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape

from lorasweep.errors import RecordError
from lorasweep.record import ConfirmRow, TrialRow
from lorasweep.sweep.definition.seeds import describe_confirm
from lorasweep.sweep.status import (
    SweepStatus,
    describe_params,
    ended_rows,
    params_of,
    read_status,
    render_status,
)

POLL_INTERVAL_S = 1.0
"""Seconds between two readings of a sweep's record."""


class ProgressDisplay:
    """Shows each status that it is called with. As a context manager, it removes the live table at its end."""

    def __init__(self, console: Console, *, announce: bool = True) -> None:
        """Takes the console; `announce` says whether the sweep's folder, notes and warnings are printed too."""
        self._console = console
        self._announce = announce
        self._status: SweepStatus | None = None
        self._shown: set[str] = set()
        """Runs that have a line already, and runs that had ended before the first status."""
        self._warnings: set[str] = set()
        self._live = Live(console=console, get_renderable=self._render, transient=True)

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, status: SweepStatus) -> None:
        """Shows a status: new warnings, and a line for each trial that has ended since the last one."""
        if self._status is None:
            self._shown = {row.run for row in ended_rows(status.record)}
            if self._announce:
                self._print(f"sweep {status.record.name} in {status.folder}")
                for note in status.record.notes:
                    self._print(f"• {note}")
        self._status = status
        if self._announce:
            for warning in status.record.warnings:
                if warning not in self._warnings:
                    self._warnings.add(warning)
                    self._print(f"warning: {warning}")
        if not self._console.is_terminal:
            for line in self._new_lines(status):
                self._print(line)

    def _render(self) -> RenderableType:
        return "" if self._status is None else render_status(self._status)

    def _print(self, line: str) -> None:
        self._console.print(escape(line), highlight=False, soft_wrap=True)

    def _new_lines(self, status: SweepStatus) -> Iterator[str]:
        """Yields a line for each run that has ended and has no line yet: `lora 4/6  complete  1.4  optim.lr=0.01`."""
        record, ended = status.record, ended_rows(status.record)
        asked: dict[tuple[type, str], int] = {(TrialRow, arm.name): arm.asked for arm in status.arms}
        asked |= {(ConfirmRow, arm.name): arm.seeds_asked for arm in status.arms}
        done: Counter[tuple[type, str]] = Counter((type(row), row.arm) for row in ended if row.run in self._shown)
        for row in ended:
            if row.run in self._shown:
                continue
            stage = type(row), row.arm
            if isinstance(row, ConfirmRow) and not any(kind is ConfirmRow for kind, _ in done):
                yield f"confirm: {describe_confirm(len(record.confirm_seeds))}"
            done[stage] += 1
            self._shown.add(row.run)
            score = "-" if row.value is None else f"{row.value:.4f}"
            params = describe_params(params_of(row, record))
            yield f"{row.arm} {done[stage]}/{asked[stage]}  {row.state:<10} {score:>8}  {params}"


@contextmanager
def show_progress(folder: Path, console: Console) -> Iterator[None]:
    """Shows a sweep on a console while the caller has it trained, in this process or elsewhere."""
    with ProgressDisplay(console) as display, report_status(folder, display):
        yield


@contextmanager
def report_status(folder: Path, on_status: Callable[[SweepStatus], None]) -> Iterator[None]:
    """Calls a function with the sweep's status from a thread, about once a second and a last time at the end."""

    def read() -> SweepStatus:
        return replace(read_status(folder), is_running=True)  # also before a process on Ray has opened it

    on_status(read())  # here and not in the thread, so that it shows the sweep before any trial has ended
    stop = threading.Event()
    thread = threading.Thread(target=_poll, args=(read, on_status, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def show_until_over(folder: Path, console: Console) -> None:
    """Shows a sweep that other processes train until it is over, or no process runs it."""
    first, stop = read_status(folder), threading.Event()

    def show(status: SweepStatus) -> None:
        display(status)
        if status.is_over:
            stop.set()

    with ProgressDisplay(console, announce=False) as display:
        show(first)
        if not stop.is_set():
            _poll(lambda: read_status(folder), show, stop)


def _poll(read: Callable[[], SweepStatus], on_status: Callable[[SweepStatus], None], stop: threading.Event) -> None:
    """Reads the status and hands it on until `stop` is set, and then once more."""
    while True:
        is_last = stop.is_set()
        with suppress(RecordError, OSError):  # the folder is being moved, or a disk is away for a while
            on_status(read())
        if is_last:
            return
        stop.wait(POLL_INTERVAL_S)
