"""Shows a sweep while it runs: a live table in a terminal, plain lines in a notebook or a pipe, or a caller's function.

All of it reads the sweep's record about once a second, so it does not matter which process trains.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
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
MAX_READ_FRACTION = 0.05
"""Largest fraction of the time that reading may take: the process that reads may also be the one that trains."""


class ProgressDisplay:
    """Shows each status that it is called with. Use it as a context, at whose end the live table is removed."""

    def __init__(self, console: Console, *, announce: bool = True) -> None:
        """Takes where to print; `announce` prints the sweep's folder, notes and warnings too."""
        self._console = console
        self._announce = announce
        self._status: SweepStatus | None = None
        self._shown: set[str] = set()
        """Runs that have a line already, and runs that had ended before the first status."""
        self._warnings: set[str] = set()
        self._live = Live(console=console, get_renderable=lambda: Group(self._render()), transient=True)

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        """Yields a line for each trial that has ended and has none yet."""
        record, shown = status.record, self._shown
        new = [row for row in ended_rows(record) if row.run not in shown]
        done = Counter((type(row), row.arm) for row in ended_rows(record) if row.run in shown)
        trials_asked = {arm.name: arm.asked for arm in status.arms}
        seeds_asked = {arm.name: arm.seeds_asked for arm in status.arms}
        for row in new:
            in_search = isinstance(row, TrialRow)
            if not in_search and not any(kind is ConfirmRow for kind, _ in done):
                yield f"confirm: {describe_confirm(len(record.confirm_seeds))}"
            done[type(row), row.arm] += 1
            shown.add(row.run)
            asked = (trials_asked if in_search else seeds_asked).get(row.arm, 0)
            score = "-" if row.value is None else f"{row.value:.4f}"
            params = describe_params(params_of(row, record))
            yield f"{row.arm} {done[type(row), row.arm]}/{asked}  {row.state:<10} {score:>8}  {params}"


@contextmanager
def show_progress(folder: Path, console: Console) -> Iterator[None]:
    """Shows a sweep on a console while the caller has it trained, in this process or elsewhere."""
    with ProgressDisplay(console) as display, watch_sweep(folder, display):
        yield


@contextmanager
def watch_sweep(folder: Path, on_status: Callable[[SweepStatus], None]) -> Iterator[None]:
    """Calls a function with the sweep's status from a thread, about once a second, and a last time at the end."""

    def read() -> SweepStatus:
        return replace(read_status(folder), is_running=True)  # also before a process on Ray has opened it

    on_status(read())
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
    """Reads and hands on the status until `stop` is set, and once more then."""
    while True:
        is_last = stop.is_set()
        began = time.monotonic()
        with suppress(RecordError, OSError):  # the folder is being moved, or a disk is away for a while
            on_status(read())
        if is_last:
            return
        stop.wait(max(POLL_INTERVAL_S, (time.monotonic() - began) / MAX_READ_FRACTION))
