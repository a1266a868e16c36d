"""Shows the state of a sweep: a table for `lorasweep status`, and while it runs a live table or plain lines.

This file only reads the sweep's record, so it can show a sweep that other processes train. It takes no lock, and writes
no file.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorasweep.errors import RecordError
from lorasweep.record import (
    SWEEP_FILE,
    ArmRow,
    SweepRecord,
    Trial,
    describe_confirmation,
    find_winner,
    list_confirm_runs,
    measure_stage_occupancy,
    read_sweep,
)
from lorasweep.sweep.lock import is_running
from lorasweep.wording import UNKNOWN, format_seconds, format_setting, format_share, nearest

MAX_SHOWN_RUNS = 16
"""Maximum number of running trials that are listed below the table."""
MIN_SHOWN_AGE_S = 5.0
"""The table says how old the record is from this age on, in seconds."""
POLL_INTERVAL_S = 1.0
"""Seconds between two reads of a sweep's record."""


@dataclass(frozen=True, kw_only=True)
class StageCounts:
    """Numbers of runs of one arm in one stage. Infeasible runs count as failed. Only the search pauses and prunes."""

    asked: int
    done: int
    running: int
    paused: int
    pruned: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class ArmStatus:
    """The state of one arm."""

    name: str
    is_trained: bool
    """Whether the runs of the arm train; those of `frozen` take too little time for an estimate."""
    search: StageCounts
    confirm: StageCounts
    best: float | None
    """Search score of the best trial."""
    best_params: Mapping[str, Any]
    test_mean: float | None
    """Mean of the metric on test data over the complete seeds."""

    @property
    def stages(self) -> tuple[StageCounts, ...]:
        return self.search, self.confirm


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """The state of a sweep at one moment."""

    folder: Path
    record: SweepRecord
    record_age_s: float
    """Seconds since the record was written. A sweep writes it at evaluations, so it may be minutes old."""
    is_running: bool
    arms: tuple[ArmStatus, ...]

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds for the remaining trainings, from the mean so far; None before the first one has ended."""
        stages = [stage for arm in self.arms if arm.is_trained for stage in arm.stages]
        asked, done = sum(stage.asked for stage in stages), sum(stage.done for stage in stages)
        return self.record.makespan_s / done * (asked - done) if done else None


def read_status(folder: Path) -> SweepStatus:
    """Reads the state of a sweep. Raises `RecordError` if the folder has no sweep, or if its record is damaged."""
    path = folder / SWEEP_FILE
    if not path.is_file():
        others = [str(other.parent) for other in folder.parent.glob(f"*/{SWEEP_FILE}")]
        raise RecordError(
            f"`lorasweep status` must get the folder of a sweep, but {str(folder)!r} "
            f"{f'has no {SWEEP_FILE}' if folder.is_dir() else 'does not exist'}. A sweep that was just started makes "
            f"it once the model and the data are loaded.{nearest(str(folder), others)}"
        )
    record = read_sweep(folder)
    arms = tuple(_arm_status(arm, record) for arm in record.arms)
    age_s = max(0.0, time.time() - path.stat().st_mtime)
    return SweepStatus(folder=folder, record=record, record_age_s=age_s, is_running=is_running(folder), arms=arms)


def render_status(status: SweepStatus) -> RenderableType:
    """Returns a table of the arms. Below the table are the running trials, or how to resume a stopped sweep."""
    record = status.record
    title = f"{record.name}: {record.metric} ({record.direction}), {record.status}"
    notes: list[str] = []
    if shares := measure_stage_occupancy(record):
        listed = ", ".join(f"{stage} {format_share(share)}" for stage, share in shares.items())
        notes.append(f"share of the packs' slots that trained: {listed}")
    if status.is_running and record.status != "complete":
        notes += _describe_running_trials(record)
        left = status.seconds_left
        expected = "" if left is None else f", about {format_seconds(left)} left at this pace"
        age = status.record_age_s
        written = f", as of {format_seconds(age)} ago" if age >= MIN_SHOWN_AGE_S else ""
        notes.append(f"{format_seconds(record.makespan_s)} so far{expected}{written}")
    elif record.status != "complete":
        notes.append(f"• No process runs this sweep. Type `lorasweep sweep --resume {status.folder}` to resume it.")
    return Group(Text(title, style="bold"), _arms_table(status), *map(Text, notes))


def describe_params(params: Mapping[str, Any]) -> str:
    """Returns swept values in one line: `method.rank=8 optim.lr=0.0123`."""
    return " ".join(f"{key}={format_setting(value)}" for key, value in params.items())


def list_ended_runs(record: SweepRecord) -> list[Trial]:
    return [trial for trial in (*record.trials, *record.confirm) if not trial.is_live]


def _describe_running_trials(record: SweepRecord) -> Iterator[str]:
    steps_of = {arm.name: arm.steps for arm in record.arms}
    running = [row for row in (*record.trials, *record.confirm) if row.state == "running"]
    if record.confirm:
        yield f"confirm: {describe_confirmation(record.looks)}"
    for row in running[:MAX_SHOWN_RUNS]:
        params = row.shown_params
        steps = params.get("trainer.max_steps", steps_of.get(row.arm))
        name = f"trial {row.number}" if row.stage == "search" else "confirm"
        value = "" if row.last_value is None else f"  {row.last_value:.4f}"
        yield f"now: {row.arm} {name}  step {row.step}{f'/{steps}' if steps else ''}{value}  {describe_params(params)}"
    if len(running) > MAX_SHOWN_RUNS:
        yield f"now: {len(running) - MAX_SHOWN_RUNS} more"


def _arms_table(status: SweepStatus) -> Table:
    confirms = any(arm.confirm.asked for arm in status.arms)
    tested = any(arm.test_mean is not None for arm in status.arms)
    table = Table(header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    counts = {
        name: [sum(getattr(stage, name) for stage in arm.stages) for arm in status.arms]
        for name in ("running", "paused", "pruned", "failed")
    }
    shown = {name: numbers for name, numbers in counts.items() if any(numbers)}  # leaves room for names and settings
    table.add_column("arm", overflow="fold", min_width=min(20, max(len(arm.name) for arm in status.arms)))
    for name in ["trials", *shown, *(["confirm"] if confirms else []), "best", *(["test"] if tested else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best settings", overflow="fold", min_width=len("best settings"))
    for index, arm in enumerate(status.arms):
        table.add_row(
            escape(arm.name),
            f"{arm.search.done}/{arm.search.asked}",
            *(str(numbers[index]) for numbers in shown.values()),
            *([f"{arm.confirm.done}/{arm.confirm.asked}"] if confirms else []),
            _format_score(arm.best),
            *([_format_score(arm.test_mean)] if tested else []),
            escape(describe_params(arm.best_params)),
        )
    return table


def _format_score(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _arm_status(arm: ArmRow, record: SweepRecord) -> ArmStatus:
    trials = [row for row in record.trials if row.arm == arm.name]
    best = find_winner(trials, record=record)
    subjects = [row.subject for row in record.settings if row.arm == arm.name]
    confirmed = [row for subject in subjects for row in list_confirm_runs(subject, record=record)]
    tested = [row.value for row in confirmed if row.state == "complete" and row.value is not None]
    return ArmStatus(
        name=arm.name,
        is_trained=arm.method != "frozen",
        search=_count_runs(trials, asked=arm.trials),
        best=None if best is None else best.value,
        best_params={} if best is None else best.params,
        confirm=_count_runs(confirmed, asked=max(_count_planned_runs(arm, subjects, record), len(confirmed))),
        test_mean=fmean(tested) if tested else None,
    )


def _count_planned_runs(arm: ArmRow, subjects: Sequence[str], record: SweepRecord) -> int:
    """Returns the number of confirm runs of an arm, up to the look that is due."""
    if arm.method == "frozen":  # perhaps no seed changes its score; its begun runs are counted
        return min(len(record.looks), 1)
    trained = dict.fromkeys(subjects or [arm.name], record.looks[0] if record.looks else 0)
    for done, seeds in zip(record.looks_done, record.looks[1:], strict=False):
        trained |= {subject: seeds for subject in done.next if subject in trained}
    return sum(trained.values())


def _count_runs(rows: Sequence[Trial], *, asked: int) -> StageCounts:
    states = Counter(row.state for row in rows)
    return StageCounts(
        asked=asked,
        done=len(rows) - states["running"] - states["paused"],
        running=states["running"],
        paused=states["paused"],
        pruned=states["pruned"],
        failed=states["failed"] + states["infeasible"],
    )


class ProgressDisplay:
    """Shows each status that it is called with. Removes the live table at the end of the `with` block."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        """`verbose` also prints the sweep's notes."""
        self._console = console
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
            self._print(f"sweep {status.record.name} in {status.folder}")
            for note in status.record.notes if self._verbose else ():
                self._print(f"• {note}")
        self._status = status
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
                yield f"confirm: {describe_confirmation(record.looks)}"
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
