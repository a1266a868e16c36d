"""How a sweep stands, read from its folder while it runs and after.

Only files are read, each written whole, so looking locks and changes nothing and needs no database.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorasweep.errors import RecordError
from lorasweep.record import ArmRow, SweepRecord, TrialRow, read_sweep, winners
from lorasweep.sweep.controller.lifecycle import is_running
from lorasweep.sweep.live import describe_params
from lorasweep.wording import UNKNOWN, format_seconds

POLL_INTERVAL_S = 1.0
LINE_INTERVAL_S = 10.0
"""Shortest time between two lines where there is no terminal."""


@dataclass(frozen=True, kw_only=True)
class ArmStatus:
    """One arm in the search and, where there is one, the confirm stage."""

    name: str
    asked: int
    done: int
    running: int
    paused: int
    pruned: int
    failed: int
    """Failed or infeasible."""
    best: float | None
    best_params: Mapping[str, Any] = field(default_factory=dict)
    seeds_asked: int = 0
    seeds_done: int = 0
    seeds_running: int = 0


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """A sweep at one moment."""

    folder: Path
    record: SweepRecord
    is_running: bool
    """Whether a process has it open."""
    arms: tuple[ArmStatus, ...]

    @property
    def is_over(self) -> bool:
        """Whether the sweep is complete, or no process runs it."""
        return self.record.status == "complete" or not self.is_running


def read_status(folder: Path) -> SweepStatus:
    """Reads how a sweep stands.

    Raises:
        RecordError: The folder is no sweep, or its record is damaged.
    """
    record = read_sweep(folder)
    best = winners(record)
    return SweepStatus(
        folder=folder,
        record=record,
        is_running=is_running(folder),
        arms=tuple(_arm_status(arm, record, best.get(arm.name)) for arm in record.arms),
    )


def render_status(status: SweepStatus) -> RenderableType:
    """Returns how a sweep stands: its arms, and what to type to resume it where it was stopped."""
    record = status.record
    title = f"{record.name}: {record.metric} ({record.direction}), {record.status}"
    notes = []
    if status.is_over and record.status != "complete":
        notes.append(f"• No process runs it. Type `lorasweep sweep --resume {status.folder}` to resume it.")
    return Group(Text(title, style="bold"), _arms_table(status), *map(Text, notes))


def follow(folder: Path, *, console: Console) -> None:
    """Shows how a sweep stands until it is over: a table that moves, or a line now and then without a terminal."""
    status = read_status(folder)
    printed, printed_at = "", -math.inf
    with Live(console=console, get_renderable=lambda: render_status(status), transient=True) as live:
        if not console.is_terminal:
            live.stop()
        while True:
            with suppress(RecordError, OSError):  # the folder is being moved, or a disk is away for a while
                status = read_status(folder)
            line = _describe(status)
            if not console.is_terminal and line != printed and time.monotonic() - printed_at >= LINE_INTERVAL_S:
                console.print(escape(line), highlight=False, soft_wrap=True)
                printed, printed_at = line, time.monotonic()
            if status.is_over:
                return
            time.sleep(POLL_INTERVAL_S)


def _describe(status: SweepStatus) -> str:
    """How a sweep stands in one line."""
    arms = status.arms
    parts = [f"{sum(arm.done for arm in arms)}/{sum(arm.asked for arm in arms)} trials"]
    if any(arm.seeds_done or arm.seeds_running for arm in arms):
        parts.append(f"{sum(arm.seeds_done for arm in arms)}/{sum(arm.seeds_asked for arm in arms)} confirm runs")
    for word in ("paused", "pruned", "failed"):
        if number := sum(getattr(arm, word) for arm in arms):
            parts.append(f"{number} {word}")
    parts += [f"{arm.name} {arm.best:.4f}" for arm in arms if arm.best is not None]
    return ", ".join([*parts, f"{format_seconds(status.record.makespan_s)} so far"])


def _arms_table(status: SweepStatus) -> Table:
    confirms = any(arm.seeds_asked for arm in status.arms)
    table = Table(header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    columns = ("trials", "running", "paused", "pruned", "failed", *(["confirm"] if confirms else []), "best")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best settings", overflow="fold")
    for arm in status.arms:
        table.add_row(
            escape(arm.name),
            f"{arm.done}/{arm.asked}",
            str(arm.running + arm.seeds_running),
            str(arm.paused),
            str(arm.pruned),
            str(arm.failed),
            *([f"{arm.seeds_done}/{arm.seeds_asked}"] if confirms else []),
            UNKNOWN if arm.best is None else f"{arm.best:.4f}",
            escape(describe_params(arm.best_params)),
        )
    return table


def _arm_status(arm: ArmRow, record: SweepRecord, best: TrialRow | None) -> ArmStatus:
    states = [trial.state for trial in record.trials if trial.arm == arm.name]
    reruns = [rerun.state for rerun in record.confirm if rerun.arm == arm.name]
    if best is None:  # nothing of it trains, so it is no winner
        scored = [t for t in record.trials if t.arm == arm.name and t.state == "complete" and t.value is not None]
        best = scored[0] if scored else None
    return ArmStatus(
        name=arm.name,
        asked=arm.trials,
        done=len(states) - states.count("running") - states.count("paused"),
        running=states.count("running"),
        paused=states.count("paused"),
        pruned=states.count("pruned"),
        failed=states.count("failed") + states.count("infeasible"),
        best=None if best is None else best.value,
        best_params={} if best is None else best.params,
        seeds_asked=len(record.confirm_seeds[:1] if arm.method == "frozen" else record.confirm_seeds),
        seeds_done=len(reruns) - reruns.count("running"),
        seeds_running=reruns.count("running"),
    )
