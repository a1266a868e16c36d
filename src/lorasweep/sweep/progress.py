"""Shows a sweep while it runs: a live table in a terminal, plain lines in a notebook or a pipe.

It reads the sweep's record about once a second, so it can show a sweep that other processes train.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape

from lorasweep.errors import RecordError
from lorasweep.sweep.status import (
    SweepStatus,
    describe_confirm_stage,
    describe_params,
    list_ended_runs,
    read_status,
    render_status,
)

POLL_INTERVAL_S = 1.0
"""Seconds between two reads of a sweep's record."""


class ProgressDisplay:
    """Shows each status that it is called with. Removes the live table at the end of the `with` block."""

    def __init__(self, console: Console, *, announce: bool = True, verbose: bool = False) -> None:
        """`announce` also prints the sweep's folder and warnings, and with `verbose` its notes."""
        self._console = console
        self._announce = announce
        self._verbose = verbose
        self._status: SweepStatus | None = None
        self._shown_runs: set[str] = set()
        """Runs that had ended before the first status or whose line is printed."""
        self._shown_warnings: set[str] = set()
        self._live = Live(console=console, get_renderable=self._render, transient=True)

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, status: SweepStatus) -> None:
        """Prints new warnings and, without a terminal, a line for each run that ended since the last status."""
        if self._status is None:
            self._shown_runs = {row.run for row in list_ended_runs(status.record)}
            if self._announce:
                self._print(f"sweep {status.record.name} in {status.folder}")
                for note in status.record.notes if self._verbose else ():
                    self._print(f"• {note}")
        self._status = status
        if self._announce:
            for warning in status.record.warnings:
                if warning not in self._shown_warnings:
                    self._shown_warnings.add(warning)
                    self._print(f"warning: {warning}")
        if not self._console.is_terminal:
            for line in self._new_lines(status):
                self._print(line)

    def _render(self) -> RenderableType:
        return "" if self._status is None else render_status(self._status)

    def _print(self, line: str) -> None:
        self._console.print(escape(line), highlight=False, soft_wrap=True)

    def _new_lines(self, status: SweepStatus) -> Iterator[str]:
        """Yields a line for each run that ended and has no line yet: `lora 4/6  complete  1.4  optim.lr=0.01`."""
        record, ended = status.record, list_ended_runs(status.record)
        stages = ("search", "confirm")
        asked = {(stage, arm.name): getattr(arm, stage).asked for arm in status.arms for stage in stages}
        done = Counter((row.stage, row.arm) for row in ended if row.run in self._shown_runs)
        for row in ended:
            if row.run in self._shown_runs:
                continue
            stage = row.stage, row.arm
            if row.stage == "confirm" and not any(name == "confirm" for name, _ in done):
                yield describe_confirm_stage(record)
            done[stage] += 1
            self._shown_runs.add(row.run)
            score = "-" if row.value is None else f"{row.value:.4f}"
            params = describe_params(row.shown_params)
            yield f"{row.arm} {done[stage]}/{asked[stage]}  {row.state:<10} {score:>8}  {params}"


@contextmanager
def show_progress(folder: Path, console: Console, *, verbose: bool = False) -> Iterator[None]:
    """Shows a sweep on a console during the block, in which the caller trains it."""
    with ProgressDisplay(console, verbose=verbose) as display, report_status(folder, display):
        yield


@contextmanager
def report_status(folder: Path, on_status: Callable[[SweepStatus], None]) -> Iterator[None]:
    """Calls a function with the sweep's status: once at the start, then about once a second, and once at the end."""

    def read() -> SweepStatus:
        return replace(read_status(folder), is_running=True)  # a controller on Ray may not have opened the sweep yet

    stop = threading.Event()

    def poll() -> None:
        is_last = False
        while not is_last:
            is_last = stop.wait(POLL_INTERVAL_S)  # the last call is after the stop, so that it shows the end
            status = None
            with suppress(RecordError, OSError):  # for example while the folder is moved
                status = read()
            if status is not None:
                on_status(status)  # outside of `suppress`: an OSError of the user's own function is shown

    on_status(read())  # not in the thread, so that the sweep is shown before any trial has ended
    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def show_until_over(folder: Path, console: Console) -> None:
    """Shows a sweep that other processes train, until it is complete or no process runs it."""
    status = read_status(folder)
    with ProgressDisplay(console, announce=False) as display:
        display(status)
        while not status.is_over:
            time.sleep(POLL_INTERVAL_S)
            with suppress(RecordError, OSError):
                status = read_status(folder)
            display(status)
