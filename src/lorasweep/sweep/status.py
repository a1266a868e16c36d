"""Shows the state of a sweep: a table for `lorasweep status`, and while it runs a live table or plain lines.

This file only reads the sweep's record, so it can show a sweep that other processes train. It takes no lock, and writes
no file.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lorasweep.disk import is_running
from lorasweep.errors import RecordError
from lorasweep.record import (
    STATES,
    SWEEP_FILE,
    ArmRow,
    SweepRecord,
    Trial,
    TrialState,
    describe_confirmation,
    find_winner,
    read_run,
    read_sweep,
)
from lorasweep.wording import UNKNOWN, format_seconds, format_settings, suggest_nearest

MAX_SHOWN_RUNS = 16
"""Maximum number of running trials that are listed below the table."""
MIN_SHOWN_AGE_S = 5.0
"""The table says how old the record is from this age on, in seconds."""
MAX_MEASURED_RUNS = 4
"""Maximum number of runs of an arm from which the time of a step is read. More would make each poll slower."""
POLL_INTERVAL_S = 1.0
"""Seconds between two reads of a sweep's record."""


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """The runs of one arm in one stage. Only the search stops runs."""

    runs: list[Trial]
    asked: int
    """Number of runs; in the confirm stage up to the look that is due."""

    @property
    def done(self) -> int:
        return sum(run.state != "running" for run in self.runs)

    def estimate_steps_left(self, steps: int) -> float:
        """Returns the steps left if runs stop where the earlier ones did on average, or after `steps` steps."""
        stops = [run.step for run in self.runs if run.state != "running"]
        running = [run.step for run in self.runs if run.state == "running"]
        stop = fmean(stops) if stops else steps
        left = sum((stop if step < stop else max(step, steps)) - step for step in running)
        return left + stop * (self.asked - len(self.runs))


@dataclass(frozen=True, kw_only=True)
class ArmStatus:
    """The state of one arm."""

    name: str
    steps: int
    """Optimizer steps of a complete run; 0 if nothing trains."""
    step_s: float
    """Seconds of a step in the arm's last runs; in a pack, a run's share of them. 0 before a run has ended."""
    search: StageStatus
    confirm: StageStatus
    best: Trial | None
    """The best complete trial."""
    test_mean: float | None
    """Mean of the metric on test data over the complete seeds."""

    @property
    def stages(self) -> tuple[StageStatus, ...]:
        return self.search, self.confirm

    def count(self, state: TrialState) -> int:
        return sum(run.state == state for stage in self.stages for run in stage.runs)


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
        """Estimated seconds up to the look that is due; None before a run has ended.

        The work is the sum of `step_s` over steps. The estimate assumes that the time per work stays as it was so far,
        so it includes loading, scoring and the number of workers.
        """
        stages = [(arm, stage) for arm in self.arms for stage in arm.stages]
        done = sum(arm.step_s * run.step for arm, stage in stages for run in stage.runs)
        if not done:
            return None
        due = sum(arm.step_s * stage.estimate_steps_left(arm.steps) for arm, stage in stages)
        return self.record.makespan_s / done * due


def read_status(folder: Path) -> SweepStatus:
    """Reads the state of a sweep. Raises `RecordError` if the folder has no sweep, or if its record is damaged."""
    path = folder / SWEEP_FILE
    if not path.is_file():
        others = [str(other.parent) for other in folder.parent.glob(f"*/{SWEEP_FILE}")]
        raise RecordError(
            f"`lorasweep status` must get the folder of a sweep, but {str(folder)!r} "
            f"{f'has no {SWEEP_FILE}' if folder.is_dir() else 'does not exist'}. A sweep that was just started makes "
            f"it once the model and the data are loaded.{suggest_nearest(str(folder), others)}"
        )
    record = read_sweep(folder)
    arms = tuple(_arm_status(arm, record, folder) for arm in record.arms)
    age_s = max(0.0, time.time() - path.stat().st_mtime)
    return SweepStatus(folder=folder, record=record, record_age_s=age_s, is_running=is_running(folder), arms=arms)


def render_status(status: SweepStatus) -> RenderableType:
    """Returns a table of the arms. Below the table are the running trials, or how to resume a stopped sweep."""
    record = status.record
    title = f"{record.name}: {record.metric} ({record.direction}), {record.status}"
    notes: list[str] = []
    if status.is_running and record.status != "complete":
        notes += _describe_running_trials(record)
        age = status.record_age_s
        written = f"as of {format_seconds(age)} ago: " if age >= MIN_SHOWN_AGE_S else ""
        notes.append(f"{written}{format_seconds(record.makespan_s)} so far{_describe_time_left(status)}")
    elif record.status != "complete":
        notes.append(f"• No process runs this sweep. Type `lorasweep sweep --resume {status.folder}` to resume it.")
    return Group(Text(title, style="bold"), _arms_table(status), *map(Text, notes))


def list_ended_runs(record: SweepRecord) -> list[Trial]:
    return [trial for trial in (*record.trials, *record.confirm) if trial.state != "running"]


def _describe_time_left(status: SweepStatus) -> str:
    if status.seconds_left is None:
        return ""
    limit = "more than" if any(arm.steps and not arm.step_s for arm in status.arms) else "about"
    more = "; open questions need more seeds" if len(status.record.looks) > 1 + len(status.record.looks_done) else ""
    return f", {limit} {format_seconds(status.seconds_left)} left (by the last runs of each arm{more})"


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
        yield f"now: {row.arm} {name}  step {row.step}{f'/{steps}' if steps else ''}{value}  {format_settings(params)}"
    if len(running) > MAX_SHOWN_RUNS:
        yield f"now: {len(running) - MAX_SHOWN_RUNS} more"


def _arms_table(status: SweepStatus) -> Table:
    confirms = any(arm.confirm.asked for arm in status.arms)
    tested = any(arm.test_mean is not None for arm in status.arms)
    table = Table(header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    counts = {state: [arm.count(state) for arm in status.arms] for state in STATES if state != "complete"}
    shown = {state: numbers for state, numbers in counts.items() if any(numbers)}  # leaves room for names and settings
    table.add_column("arm", overflow="fold", min_width=min(20, max(len(arm.name) for arm in status.arms)))
    names = [state if status.is_running or state != "running" else "interrupted" for state in shown]
    for name in ["trials", *names, *(["confirm"] if confirms else []), "best", *(["test"] if tested else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best settings", overflow="fold", min_width=len("best settings"))
    for index, arm in enumerate(status.arms):
        table.add_row(
            arm.name,
            f"{arm.search.done}/{arm.search.asked}",
            *(str(numbers[index]) for numbers in shown.values()),
            *([f"{arm.confirm.done}/{arm.confirm.asked}"] if confirms else []),
            _format_score(arm.best.value if arm.best else None),
            *([_format_score(arm.test_mean)] if tested else []),
            format_settings(arm.best.params) if arm.best else "",
        )
    return table


def _format_score(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _arm_status(arm: ArmRow, record: SweepRecord, folder: Path) -> ArmStatus:
    trials = [row for row in record.trials if row.arm == arm.name]
    subjects = [row.subject for row in record.settings if row.arm == arm.name]
    confirmed = [row for row in record.confirm_runs if row.arm == arm.name]
    tested = [row.value for row in confirmed if row.state == "complete" and row.value is not None]
    return ArmStatus(
        name=arm.name,
        steps=arm.steps,
        step_s=_measure_step([*trials, *confirmed], folder),
        search=StageStatus(runs=trials, asked=arm.trials),
        confirm=StageStatus(runs=confirmed, asked=max(_count_due_runs(arm, subjects, record), len(confirmed))),
        best=find_winner(trials, record=record),
        test_mean=fmean(tested) if tested else None,
    )


def _measure_step(runs: Sequence[Trial], folder: Path) -> float:
    """Returns the mean seconds of a step in the last runs of an arm, from the runs' own records."""
    wall_s, steps = 0.0, 0
    for run in [run for run in runs if run.state != "running" and run.step][-MAX_MEASURED_RUNS:]:
        with suppress(RecordError):  # someone removed the run's folder
            record = read_run(folder / run.run)
            wall_s, steps = wall_s + record.wall_s, steps + record.steps_done
    return wall_s / steps if steps else 0.0


def _count_due_runs(arm: ArmRow, subjects: Sequence[str], record: SweepRecord) -> int:
    """Returns the number of confirm runs of an arm up to the look that is due."""
    if arm.is_base:  # its score is mostly the same for every seed
        return min(len(record.looks), 1)
    subjects = subjects or [subject.name for subject in arm.subjects]  # before the settings are chosen
    due = dict.fromkeys(subjects, record.looks[0] if record.looks else 0)
    for done, seeds in zip(record.looks_done, record.looks[1:], strict=False):
        due |= {subject: seeds for subject in done.next if subject in due}
    return sum(due.values())


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
        # without a terminal a line stays whole, for programs that read it
        self._console.print(line, highlight=False, soft_wrap=not self._console.is_terminal)

    def _new_lines(self, status: SweepStatus) -> Iterator[str]:
        """Yields a line for each run that ended and has no line yet: `lora 4/6  complete  1.4  lr 0.01`."""
        asked = {("search", arm.name): arm.search.asked for arm in status.arms}
        asked |= {("confirm", arm.name): arm.confirm.asked for arm in status.arms}
        done = Counter((row.stage, row.arm) for row in list_ended_runs(status.record) if row.run in self._shown_runs)
        for row in list_ended_runs(status.record):
            if row.run in self._shown_runs:
                continue
            if row.stage == "confirm" and not any(name == "confirm" for name, _ in done):
                yield f"confirm: {describe_confirmation(status.record.looks)}"
            stage = row.stage, row.arm
            done[stage] += 1
            self._shown_runs.add(row.run)
            score = "-" if row.value is None else f"{row.value:.4f}"
            params = format_settings(row.shown_params)
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
