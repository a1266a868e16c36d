"""What a person sees while a sweep runs: one table that moves, or a line per trial where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorasweep.record import Direction
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.definition import Arm, Definition
from lorasweep.sweep.fairness import find_warnings
from lorasweep.sweep.plan import ArmPlan
from lorasweep.wording import format_bytes, format_count, format_seconds

COLUMNS = {
    "search": ("arm", "trials", "pruned", "best", "best settings", "time left"),
    "confirm": ("arm", "seeds", "failed", "mean on test", "settings", "time left"),
}
"""Headings of the table in each stage; the settings are the only column of text beside the arm."""


@dataclass(kw_only=True)
class ArmProgress:
    """How far an arm is in the present stage."""

    asked: int
    done: int = 0
    pruned: int = 0
    lost: int = 0
    best: float | None = None
    """The best score of the search; in the confirm stage the mean over seeds."""
    best_params: Mapping[str, Any] | None = None
    scores: list[float] = field(default_factory=list)
    """Of the confirm stage."""
    seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time for the trials left at the pace so far, or None before the first has ended."""
        return self.seconds / self.done * (self.asked - self.done) if self.done else None


@dataclass(kw_only=True)
class RunningTrial:
    """The trial that runs now."""

    arm: Arm
    number: int
    params: Mapping[str, Any]
    steps: int
    step: int = 0
    value: float | None = None
    started: float = 0.0


class LiveTable:
    """An observer that shows the stage, its arms, the running trials, scores so far and the time left.

    A context manager.
    """

    def __init__(self, sweep: SweepFolder, *, console: Console) -> None:
        self.sweep = sweep
        self.stage = "search"
        self.title = f"{sweep.record.name}: {sweep.record.metric} ({sweep.record.direction})"
        self.direction: Direction = sweep.record.direction
        self.console = console
        self.arms = {arm.name: _progress_so_far(sweep, arm) for arm in sweep.definition.arms}
        self.running: dict[tuple[str, int], RunningTrial] = {}
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def stage_started(self, stage: str, asked: Mapping[str, int]) -> None:
        """Shows the stage's own table; without a terminal, a line where the confirm stage begins."""
        self.stage = stage
        self.running = {}
        if stage != "confirm":
            return
        self.arms = {name: ArmProgress(asked=number) for name, number in asked.items() if number}
        for row in self.sweep.record.confirm:
            if row.state != "running":
                self._count(self.arms[row.arm], row.state, row.value, {})
        if not self.console.is_terminal:
            self.console.print(f"confirm: {_describe_confirm(max(asked.values(), default=0))}", soft_wrap=True)

    def trial_started(self, arm: Arm, number: int, params: Mapping[str, Any], *, steps: int) -> None:
        """Shows the new trial."""
        self.running[arm.name, number] = RunningTrial(
            arm=arm, number=number, params=params, steps=steps, started=time.monotonic()
        )

    def evaluated(self, arm: Arm, number: int, step: int, value: float) -> None:
        """Moves the running trial's step and value."""
        running = self.running.get((arm.name, number))
        if running is not None:
            running.step, running.value = step, value

    def trial_paused(self, arm: Arm, number: int) -> None:
        """Takes the trial out of those that run."""
        self.running.pop((arm.name, number), None)

    def trial_ended(self, arm: Arm, number: int, state: str, value: float | None, *, wall_s: float) -> None:
        """Counts the trial; without a terminal, prints its line."""
        progress, running = self.arms[arm.name], self.running.pop((arm.name, number), None)
        params = running.params if running else {}
        progress.seconds += wall_s
        self._count(progress, state, value, params)
        if not self.console.is_terminal:
            score = "-" if value is None else f"{value:.4f}"
            line = f"{arm.name} {progress.done}/{progress.asked}  {state:<10} {score:>8}  {describe_params(params)}"
            self.console.print(escape(line), highlight=False, soft_wrap=True)

    def render(self) -> RenderableType:
        """Returns the table as it stands."""
        in_search = self.stage == "search"
        seeds = max((arm.asked for arm in self.arms.values()), default=0)
        heading = [] if in_search else [Text(f"confirm: {_describe_confirm(seeds)}", style="bold")]
        table = Table(title=escape(self.title), title_justify="left", header_style="bold")
        for name in COLUMNS[self.stage]:
            table.add_column(name, justify="left" if name == "arm" or name.endswith("settings") else "right")
        for name, arm in self.arms.items():
            best = "-" if arm.best is None else f"{arm.best:.4f}"
            done = f"{arm.done}/{arm.asked}" + (f" ({arm.lost} failed)" if arm.lost and in_search else "")
            left = arm.seconds_left
            table.add_row(
                escape(name),
                done,
                str(arm.pruned if in_search else arm.lost),
                best,
                escape(describe_params(arm.best_params or {})),
                "-" if left is None else format_seconds(left),
            )
        return Group(*heading, table, *map(_running_line, self.running.values()))

    def _count(self, progress: ArmProgress, state: str, value: float | None, params: Mapping[str, Any]) -> None:
        progress.done += 1
        progress.pruned += state == "pruned"
        progress.lost += state in ("failed", "infeasible")
        if state != "complete" or value is None:
            return
        if self.stage == "confirm":
            progress.scores.append(value)
            progress.best = sum(progress.scores) / len(progress.scores)
            progress.best_params = {key: kept for key, kept in params.items() if key != "seed"} or progress.best_params
        elif _beats(value, progress.best, direction=self.direction):
            progress.best, progress.best_params = value, dict(params)


def render_plan(definition: Definition, plans: Sequence[ArmPlan]) -> RenderableType:
    """Returns what a sweep would take, an arm per row, with why its trials are packed or run alone."""
    title = escape(f"{definition.name}: nothing is trained yet")
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE, padding=(0, 0))
    table.add_column("arm", overflow="fold")
    for name in ("runs", "steps", "tokens", "trained", "pack", "memory", "disk", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        table.add_row(
            escape(plan.arm.name),
            f"{plan.arm.trials} + {plan.seeds}" if plan.seeds else str(plan.arm.trials),
            format_count(plan.steps),
            format_count(plan.tokens),
            format_count(plan.trainable_params),
            str(plan.pack_size),
            format_bytes(plan.memory_bytes),
            format_bytes(plan.kept_bytes),
            format_seconds(plan.seconds),
        )
    total = format_seconds(sum(plan.seconds for plan in plans))
    notes = [f"• {plan.arm.name}: {plan.packing.reason}" for plan in plans]
    if most := max((plan.seeds for plan in plans), default=0):
        notes.append(
            f"• Stages (the two numbers of runs): search on validation data, then confirm: {_describe_confirm(most)}."
        )
    else:
        notes.append("• Stages: search on validation data; no confirm stage.")
    notes += [f"• {warning}" for warning in find_warnings(definition)]
    notes.append(f"• All arms: at most {total} on this machine, measured on a few steps; pruning takes less.")
    return Group(table, *map(Text, notes))


def _running_line(running: RunningTrial) -> Text:
    value = "" if running.value is None else f"  {running.value:.4f}"
    return Text(
        f"now: {running.arm.name} trial {running.number}  step {running.step}/{running.steps}{value}  "
        f"{describe_params(running.params)}  {format_seconds(time.monotonic() - running.started)}"
    )


def _describe_confirm(seeds: int) -> str:
    fresh = "1 fresh seed" if seeds == 1 else f"{seeds} fresh seeds"
    return f"the best settings of each arm again on {fresh}, scored once on test data"


def describe_params(params: Mapping[str, Any]) -> str:
    """Returns swept values in one line: `method.rank=8 optim.lr=0.0123`."""
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def _progress_so_far(sweep: SweepFolder, arm: Arm) -> ArmProgress:
    progress = ArmProgress(asked=arm.trials)
    for trial in (r for r in sweep.record.trials if r.arm == arm.name and r.state not in ("running", "paused")):
        progress.done += 1
        progress.pruned += trial.state == "pruned"
        progress.lost += trial.state in ("failed", "infeasible")
        complete = trial.state == "complete" and trial.value is not None
        if complete and _beats(trial.value, progress.best, direction=sweep.record.direction):  # type: ignore[arg-type]
            progress.best, progress.best_params = trial.value, trial.params
    return progress


def _beats(value: float, best: float | None, *, direction: Direction) -> bool:
    return best is None or (value < best if direction == "minimize" else value > best)
