"""A sweep's status as a person sees it: one table of all its workers, and one of its arms, that move while they run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorasweep.errors import RecordError
from lorasweep.record import RunRecord
from lorasweep.sweep.live import describe_params
from lorasweep.sweep.status import SweepStatus, WorkerStatus, pace_of, read_status
from lorasweep.wording import UNKNOWN, format_count, format_seconds, format_share

LOOK_S = 0.2
READ_S = 1.0
"""Between two readings, or ten times what one took: a sweep of thousands of trials is read in a second."""
LINE_S = 10.0
"""Between two lines, where there is no terminal."""
MOST_ROWS = 32
"""Of workers in a table."""
MOST_NAMES = 4
"""Of the runs in a pack."""


class View:
    """How a sweep stood when it was last read. What can't be read at a moment is shown as it was before."""

    def __init__(self, folder: Path, *, console: Console) -> None:
        self.status: SweepStatus | None = None
        self._folder, self._console = folder, console
        self._next = self._next_line = -math.inf
        self._line = ""

    def __call__(self) -> None:
        """Reads again where it is time; without a terminal, prints a line where something has changed."""
        began = time.monotonic()
        if began < self._next:
            return
        with suppress(RecordError, OSError):  # the folder is being moved, or a disk is away for a while
            self.status = read_status(self._folder)
        self._next = began + max(READ_S, 10 * (time.monotonic() - began))
        if not self._console.is_terminal and self.status is not None and began >= self._next_line:
            self._print(describe_status(self.status), now=began)

    @property
    def is_over(self) -> bool:
        """Whether the sweep is complete, or all workers that it had are gone."""
        return self.status is not None and self.status.is_over

    def render(self) -> RenderableType:
        """Returns the tables as they stand."""
        return Text("") if self.status is None else render_status(self.status)

    def _print(self, line: str, *, now: float) -> None:
        if line != self._line:
            self._console.print(escape(line), highlight=False, soft_wrap=True)
            self._line, self._next_line = line, now + LINE_S


def render_status(status: SweepStatus) -> RenderableType:
    """Returns how a sweep stands: workers, arms, what is left."""
    record = status.record
    title = f"{record.name}: {record.metric} ({record.direction}), {record.status}"
    parts: list[RenderableType] = [Text(title, style="bold")]
    if status.live:
        parts.append(_workers_table(status.live))
    return Group(*parts, _arms_table(status), *(Text(f"• {line}") for line in _notes(status)))


def follow(folder: Path, *, console: Console, until: Callable[[], bool] | None = None) -> None:
    """Shows how a sweep stands until told to end: a table that moves, or a line now and then without a terminal.

    Args:
        folder: The sweep's.
        console: Where it is shown.
        until: Asked several times a second whether to end; None ends when the sweep is complete, or none of the workers
            that it had is alive.
    """
    with watching(folder, console=console) as view:
        view()
        while not (view.is_over if until is None else until()):
            time.sleep(LOOK_S)
            view()


@contextmanager
def watching(folder: Path, *, console: Console) -> Iterator[View]:
    """Shows how a sweep stands while the block runs; what it gives is to be called several times a second."""
    view = View(folder, console=console)
    if not console.is_terminal:
        yield view
        return
    with Live(console=console, get_renderable=view.render, refresh_per_second=4, transient=True):
        yield view


def describe_status(status: SweepStatus) -> str:
    """Returns how a sweep stands in one line."""
    arms = status.arms
    parts = [f"{sum(arm.done for arm in arms)}/{sum(arm.asked for arm in arms)} trials"]
    if any(arm.seeds_done or arm.seeds_running for arm in arms):
        parts.append(f"{sum(arm.seeds_done for arm in arms)}/{sum(arm.seeds_asked for arm in arms)} reruns")
    if pruned := sum(arm.pruned for arm in arms):
        parts.append(f"{pruned} pruned")
    if failed := sum(arm.failed for arm in arms):
        parts.append(f"{failed} failed")
    parts.append(_count(len(status.live), "worker"))
    parts += [f"{arm.name} {arm.best:.4f}" for arm in arms if arm.best is not None]
    if status.live and status.seconds_left:
        parts.append(f"about {format_seconds(status.seconds_left)} left")
    return ", ".join(parts)


def _workers_table(workers: list[WorkerStatus]) -> Table:
    table = Table(header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("worker", overflow="fold")
    table.add_column("device", overflow="fold")
    table.add_column("runs", overflow="fold")
    for name in ("ended", "tokens/s", "idle", "seen"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in workers[:MOST_ROWS]:
        row = worker.row
        tokens = pace_of(row)
        table.add_row(
            escape(row.id),
            escape(row.device),
            escape(_runs(worker)),
            str(row.done),
            format_count(tokens) if tokens else UNKNOWN,
            format_share(row.telemetry.get("idle_fraction")),
            _ago(worker.seen_s),
        )
    return table


def _arms_table(status: SweepStatus) -> Table:
    confirms = any(arm.seeds_asked for arm in status.arms)
    table = Table(header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for name in ("trials", "running", "pruned", "failed", *(["reruns"] if confirms else []), "best"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best settings", overflow="fold")
    for arm in status.arms:
        table.add_row(
            escape(arm.name),
            f"{arm.done}/{arm.asked}",
            str(arm.running + arm.seeds_running),
            str(arm.pruned),
            str(arm.failed),
            *([f"{arm.seeds_done}/{arm.seeds_asked}"] if confirms else []),
            UNKNOWN if arm.best is None else f"{arm.best:.4f}",
            escape(describe_params(arm.best_params)),
        )
    return table


def _notes(status: SweepStatus) -> list[str]:
    live, complete = status.live, status.record.status == "complete"
    gone = [worker for worker in status.workers if not worker.is_alive]
    notes = []
    if len(live) > MOST_ROWS:
        notes.append(f"{len(live) - MOST_ROWS} more workers are alive.")
    notes += [f"{worker.row.id} {_fate(worker)}" for worker in gone if worker.row.status != "ended"][:MOST_ROWS]
    if ended := sum(worker.row.status == "ended" for worker in gone):
        notes.append(f"{_count(ended, 'worker')} ended.")
    if live and not complete:
        left = status.seconds_left
        time_left = "not known before the first trial has ended" if left is None else f"about {format_seconds(left)}"
        pace = f", {format_count(status.tokens_per_s)} tokens per second" if status.tokens_per_s else ""
        notes.append(f"Time left: {time_left}, with {_count(len(live), 'worker')}{pace}.")
    if not live and not complete:
        notes.append(
            f"No worker is alive: type `lorasweep sweep --resume {status.folder}` or "
            f"`lorasweep worker {status.folder}` to go on."
        )
    return [*notes, f"Storage: {status.storage}."]


def _fate(worker: WorkerStatus) -> str:
    if worker.row.status == "lost":
        return f"was lost: {worker.row.reason or 'it gave no sign of life'}."
    if math.isfinite(worker.seen_s):
        return f"is gone: it was last seen {_ago(worker.seen_s)}."
    return "is gone."


def _runs(worker: WorkerStatus) -> str:
    names = worker.row.running
    if len(names) == 1 and worker.runs:
        return f"{names[0]} {_progress(worker.runs[0])}"
    shown = ", ".join(names[:MOST_NAMES])
    return f"{shown} and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else shown or UNKNOWN


def _progress(run: RunRecord) -> str:
    score = "" if run.score is None else f", {run.score:.4f}"
    return f"(step {run.steps_done}/{run.steps_planned}{score})"


def _ago(seconds: float) -> str:
    return f"{format_seconds(seconds)} ago" if math.isfinite(seconds) else UNKNOWN


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
