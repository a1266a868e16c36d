"""Shows the state of a sweep: a table for `lorasweep status`, and while it runs a live table or plain lines.

This file only reads the sweep's record, without a lock, so it can show a sweep that other processes train.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorasweep.config.run import STEPS_KEY
from lorasweep.console import RUNNING_TRAINING, repeat_every
from lorasweep.disk import is_running
from lorasweep.errors import RecordError
from lorasweep.record import (
    JOURNAL_FILE,
    STATES,
    SWEEP_FILE,
    ArmRow,
    SweepRecord,
    SweepState,
    Trial,
    count_seeds_due,
    describe_confirmation,
    find_winner,
    get_run_folder,
    list_confirm_runs,
    read_last_step,
    read_sweep,
)
from lorasweep.wording import UNKNOWN, format_seconds, format_settings

MAX_SHOWN_PACKS = 16
"""Maximum number of running packs that are listed below the table."""
MAX_REASONS = 3
"""Maximum number of reasons why trials ended early that are listed below the table, the latest last."""
LATE_RATIO = 1.25
"""A sweep is late if it will take longer than planned by more than this factor. A machine's speed varies by as much."""
MIN_DONE_SHARE = 0.05
"""The pace is trusted after this share of the optimizer steps, because the time before is mostly that of loading."""
BAR_WIDTH = 30
POLL_INTERVAL_S = 1.0
"""Seconds between two reads of a sweep's record."""


@dataclass(frozen=True, kw_only=True)
class ArmStatus:
    """The runs of one arm."""

    row: ArmRow
    trials: list[Trial]
    confirm: list[Trial]
    """The confirm runs that have begun, without those of former settings."""
    num_confirm: int
    """Number of confirm runs up to the look that is due."""

    @property
    def num_steps_left(self) -> int:
        """Optimizer steps up to the look that is due, if no run is stopped.

        Confirm runs count once the search has ended, because more trials may change the settings.
        """
        confirm = self.confirm if count_ended(self.trials) >= self.row.trials else []
        runs = (*self.trials, *confirm)
        steps: list[int] = [run.params.get(STEPS_KEY, self.row.steps) for run in runs]  # they may be swept
        left = [max(planned - run.step, 0) for run, planned in zip(runs, steps, strict=True) if run.state == "running"]
        num_new = self.row.trials + self.num_confirm - len(runs)
        return round(sum(left) + num_new * (statistics.fmean(steps) if steps else self.row.steps))

    def as_json(self, record: SweepRecord) -> dict[str, Any]:
        best = find_winner(self.trials, record=record)
        return {
            "name": self.row.name,
            "trials": self.row.trials,
            "trials_ended": count_ended(self.trials),
            "confirm_runs": self.num_confirm,
            "confirm_ended": count_ended(self.confirm),
            "best": best and {"search_score": best.search_score, "params": best.params, "run": best.run},
        }


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """The state of a sweep at one moment."""

    folder: Path
    record: SweepRecord
    is_running: bool
    arms: tuple[ArmStatus, ...]
    steps: Mapping[str, int]
    """The steps done so far of each pack that trains now."""
    elapsed_s: float
    """Seconds for which the sweep has run, up to now if it runs."""

    def find_step(self, run: Trial) -> int:
        """Returns the steps of a run so far: of the pack that trains it, or up to its last evaluation."""
        return max(run.step, self.steps.get(run.pack or run.run, 0)) if run.state == "running" else run.step

    @property
    def state(self) -> SweepState:
        return self.record.find_state(is_running=self.is_running)

    def count_steps(self) -> tuple[int, int]:
        """Returns the number of optimizer steps so far, and that up to the look that is due."""
        runs = [run for arm in self.arms for run in (*arm.trials, *arm.confirm)]
        done = sum(map(self.find_step, runs))
        return done, sum(run.step for run in runs) + sum(arm.num_steps_left for arm in self.arms)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds up to the look that is due.

        The mean of what the pace says and of what the plan says, weighted by the share of the steps that is done and
        the share that is left. Without a plan the pace alone, and None before `MIN_DONE_SHARE`.
        """
        share = self.done_share
        if (planned_s := self.planned_s) is not None:
            return (1 - share) * (self.elapsed_s + (1 - share) * planned_s)
        return None if share <= MIN_DONE_SHARE else self.elapsed_s * (1 - share) / share

    @property
    def done_share(self) -> float:
        """The share of the optimizer steps up to the look that is due."""
        done, total = self.count_steps()
        return min(done / total, 1.0) if total else 0.0

    @property
    def planned_s(self) -> float | None:
        """Seconds from the start of the sweep up to the look that is due, as they were planned; None without a plan."""
        return next(iter(self.record.planned_s[len(self.record.looks_done) :]), None)

    @property
    def late(self) -> str:
        """A sentence if the sweep will probably take longer than planned up to the next look; empty otherwise."""
        planned_s, left = self.planned_s, self.seconds_left
        is_known = self.is_running and MIN_DONE_SHARE < self.done_share < 1
        if not is_known or planned_s is None or left is None or self.elapsed_s + left <= LATE_RATIO * planned_s:
            return ""
        return f"late: {format_seconds(planned_s)} were planned, and it needs about {format_seconds(left)} more"

    def as_json(self) -> dict[str, Any]:
        """Returns what `lorasweep status --json` prints."""
        record = self.record
        shown = ("name", "makespan_s", "looks")
        running = [row for row in (*record.trials, *record.confirm) if row.state == "running"]
        fields = ("arm", "stage", "number", "seed", "run", "params", "step", "last_value")
        return {
            "folder": self.folder,
            "status": self.state,
            **{name: getattr(record, name) for name in shown},
            "metric": record.search_metric.name,
            "direction": record.search_metric.direction,
            "looks_done": [look.seeds for look in record.looks_done],
            "is_running": self.is_running,
            "seconds_left": self.seconds_left,
            "late": bool(self.late),
            "arms": [arm.as_json(record) for arm in self.arms],
            "running": [{name: getattr(run, name) for name in fields} for run in running],
        }


def read_status(folder: str | Path) -> SweepStatus:
    """Reads the state of a sweep. Raises `RecordError` if the folder has no sweep, or if its record is damaged.

    >>> lorasweep.read_status("outputs/tiny").is_running
    False
    """
    folder = Path(folder)
    record = read_sweep(folder)
    num_due, arms = count_seeds_due(record.looks, record.looks_done), []
    for row in record.arms:
        trials = [trial for trial in record.trials if trial.arm == row.name]
        runs = [run for run in record.confirm_runs if run.arm == row.name]
        chosen = [setting.subject for setting in record.settings if setting.arm == row.name]
        subjects = chosen or [subject.name for subject in row.subjects]  # before the settings are chosen
        due = list_confirm_runs(subjects, seeds=num_due, is_fixed=row.has_fixed_score)
        arms.append(ArmStatus(row=row, trials=trials, confirm=runs, num_confirm=max(len(due), len(runs))))
    training = [row for row in (*record.trials, *record.confirm) if row.state == "running"]
    first = {row.pack or row.run: row.run for row in reversed(training)}  # all runs of a pack are at one step
    now, since_s = is_running(folder), time.time() - (folder / SWEEP_FILE).stat().st_mtime
    return SweepStatus(
        folder=folder,
        record=record,
        is_running=now,
        arms=tuple(arms),
        steps={pack: read_last_step(get_run_folder(folder, run)) for pack, run in first.items()},
        elapsed_s=record.makespan_s + (max(since_s, 0.0) if now else 0.0),
    )


def count_ended(runs: Sequence[Trial]) -> int:
    return sum(run.state != "running" for run in runs)


def render_status(status: SweepStatus) -> RenderableType:
    """Returns a table of the arms. Below the table are the running trials, or how to resume a stopped sweep."""
    record = status.record
    title = f"{record.name}: {record.search_metric.name} ({record.search_metric.direction}), {status.state}"
    notes: list[str] = []
    if status.state == "running":
        left = describe_time_left(status)
        elapsed = f"{format_seconds(status.elapsed_s)} so far{f', {left}' if left else ''}"
        notes += [*_list_reasons(record), *_list_running_packs(status), elapsed, *filter(None, [status.late])]
    elif status.state != "complete":
        notes.append(f"• No process runs this sweep. Type `lorasweep sweep --resume {status.folder}` to resume it.")
    bar = [_build_bar(status)] if status.state == "running" else []
    return Group(Text(title, style="bold"), _build_table(status), *bar, *map(Text, notes))


def _build_bar(status: SweepStatus) -> RenderableType:
    """Returns a bar of the optimizer steps."""
    done, total = status.count_steps()
    grid = Table.grid(padding=(0, 1))
    text = f"{done:,} of {total:,} steps"  # the first steps would be 0 %
    grid.add_row(text, ProgressBar(total=max(total, 1), completed=done, width=BAR_WIDTH, complete_style="cyan"))
    return grid


def _describe_trials(status: SweepStatus) -> str:
    """Returns `all trials, step 24 of 60, about 1 min 28 s left`; empty if no step is left."""
    (done, total), left = status.count_steps(), status.seconds_left
    time_left = f", about {format_seconds(left)} left" if left else ""
    return f"all trials, step {done:,} of {total:,}{time_left}" if done < total else ""


def describe_time_left(status: SweepStatus) -> str:
    """Returns a clause such as `answers at 3 seeds in about 2 min`; empty if the time left is not known."""
    left = status.seconds_left
    if left is None:
        return ""
    # the estimate counts steps alone, so it may end before the scores on test data come
    return f"{describe_next_answers(status.record)} {f'in about {format_seconds(left)}' if left >= 1 else 'soon'}"


def describe_next_answers(record: SweepRecord) -> str:
    """Returns a phrase that names what the time left leads to: the end, or the next look at the questions."""
    if not (due := record.looks[len(record.looks_done) :]):
        return "complete"
    more = f" (questions that stay open: up to {due[-1]})" if len(due) > 1 else ""
    return f"answers at {due[0]} {'seed' if due[0] == 1 else 'seeds'}{more}"


def _list_reasons(record: SweepRecord) -> Iterator[str]:
    """Yields the latest reasons why trials ended early, each with the trials of an arm that it ended."""
    ended = defaultdict[tuple[str, str, str], list[int]](list)
    for row in record.trials:
        if row.reason and row.state != "running":
            ended[row.state, row.arm, row.reason].append(row.number)
    for (state, arm, reason), numbers in [*ended.items()][-MAX_REASONS:]:
        yield f"{state}: {arm} trial {', '.join(map(str, numbers))}: {reason}"


def _list_running_packs(status: SweepStatus) -> Iterator[str]:
    record = status.record
    if record.confirm:
        yield f"confirm: {describe_confirmation(record.looks)}"
    packs = defaultdict[str, list[Trial]](list)
    for row in (*record.trials, *record.confirm):
        if row.state == "running":
            packs[row.pack or row.run].append(row)
    steps_of = {arm.name: arm.steps for arm in record.arms}
    for first, *others in [*packs.values()][:MAX_SHOWN_PACKS]:
        steps = first.params.get(STEPS_KEY, steps_of.get(first.arm))
        name = f"{first.arm} trial {first.number}" if first.stage == "search" else f"confirm {first.subject}"
        together = f" and {len(others)} more" if others else ""
        value = "" if first.last_value is None else f", {first.last_value:.4f} at step {first.step}"
        step = f"step {status.find_step(first)}{f' of {steps}' if steps else ''}"
        yield f"now: {name}{together}: {step}{value}  {format_settings(first.shown_params)}"
    if len(packs) > MAX_SHOWN_PACKS:
        yield f"now: {len(packs) - MAX_SHOWN_PACKS} more packs"


def _build_table(status: SweepStatus) -> Table:
    columns: dict[str, list[str]] = {"trials": [f"{count_ended(arm.trials)}/{arm.row.trials}" for arm in status.arms]}
    for state in STATES:
        runs = [[run for run in (*arm.trials, *arm.confirm) if run.state == state] for arm in status.arms]
        if state != "complete" and any(runs):  # leaves room for names and settings
            shown = "interrupted" if state == "running" and not status.is_running else state
            columns[shown] = [str(len(of_arm)) for of_arm in runs]
    if any(arm.num_confirm for arm in status.arms):
        columns["confirm"] = [f"{count_ended(arm.confirm)}/{arm.num_confirm}" for arm in status.arms]
    best = [find_winner(arm.trials, record=status.record) for arm in status.arms]
    columns["best"] = [
        UNKNOWN if trial is None or trial.search_score is None else f"{trial.search_score:.4f}" for trial in best
    ]
    table = Table(header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold", min_width=min(20, max(len(arm.row.name) for arm in status.arms)))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best settings", overflow="fold", min_width=len("best settings"))
    for arm, winner, cells in zip(status.arms, best, zip(*columns.values(), strict=True), strict=True):
        table.add_row(arm.row.name, *cells, format_settings(winner.params) if winner else "")
    return table


@contextmanager
def show_progress(folder: Path, console: Console, *, verbose: bool = False) -> Iterator[None]:
    """Shows a sweep on a console during the block, in which the caller trains it.

    A terminal has a live table, other consoles a line for each run that ended: `lora 4/6  complete  1.4  lr 0.01`. Both
    have the warnings; `verbose` adds the notes.
    """
    statuses: list[SweepStatus] = []
    printed: set[str] = set()

    def say(line: str, *, key: str = "") -> None:
        if (key or line) not in printed:
            printed.add(key or line)
            # without a terminal a line stays whole, for programs that read it
            console.print(line, highlight=False, soft_wrap=not console.is_terminal)

    def show(status: SweepStatus) -> None:
        record, is_first = status.record, not statuses
        RUNNING_TRAINING.text = _describe_trials(status)  # not of the pack that this process may train
        statuses[:] = [status]
        say(f"sweep {record.name} in {status.folder}")
        say(f"to watch it: tensorboard --logdir {status.folder}, or optuna-dashboard {status.folder / JOURNAL_FILE}")
        if record.threads:  # a worker has begun
            given = os.environ.get("OMP_NUM_THREADS")
            why = f" (`OMP_NUM_THREADS` is {given})" if given else ""
            say(f"threads of a worker: {record.threads}{why}, on {record.device}", key="worker")
        for line in (*(f"• {note}" for note in record.notes if verbose), *(f"warning: {w}" for w in record.warnings)):
            say(line)
        for stage in ("trials", "confirm") if not console.is_terminal else ():
            for arm in status.arms:
                ended = [run for run in getattr(arm, stage) if run.state != "running"]
                if is_first:  # of a resumed sweep
                    printed.update(run.run for run in ended)
                new = [run for run in ended if run.run not in printed]
                if new and stage == "confirm":
                    say(f"confirm: {describe_confirmation(record.looks)}")
                total = arm.row.trials if stage == "trials" else arm.num_confirm
                for number, run in enumerate(new, len(ended) - len(new) + 1):
                    score = record.find_run_score(run)
                    shown_score = "-" if score is None else f"{score:.4f}"
                    settings = format_settings(run.shown_params)
                    why = f": {run.reason}" if run.reason else ""
                    say(f"{run.arm} {number}/{total}  {run.state:<10} {shown_score:>8}  {settings}{why}", key=run.run)
        if (status.seconds_left or 0) >= 1 and not console.is_terminal:  # once for each look
            answers = describe_next_answers(record)
            say(f"{answers} in about {format_seconds(status.seconds_left)}", key=f"{len(record.confirm) > 0} {answers}")
        if status.late and not console.is_terminal:
            say(status.late, key="late")

    def render() -> RenderableType:
        return Group(*map(render_status, statuses))

    table = Live(console=console, get_renderable=render, transient=True) if console.is_terminal else nullcontext()
    try:
        with table, report_status(folder, show):
            yield
    finally:
        RUNNING_TRAINING.text = ""


@contextmanager
def report_status(folder: Path, on_status: Callable[[SweepStatus], None]) -> Iterator[None]:
    """Calls a function with the sweep's status: once at the start, then about once a second, and once at the end."""

    def read() -> SweepStatus:
        return replace(read_status(folder), is_running=True)  # a controller on Ray may not have opened the sweep yet

    def poll() -> None:
        try:
            status = read()
        except (RecordError, OSError):  # for example while the folder is moved
            return
        on_status(status)  # outside of `try`: an OSError of the user's own function is shown

    on_status(read())  # not in the thread, so that the sweep is shown before any trial has ended
    with repeat_every(POLL_INTERVAL_S, poll, also_at_end=True):  # the last call shows the end
        yield
