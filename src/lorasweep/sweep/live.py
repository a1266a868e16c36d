"""What a person sees while a sweep runs: one table that moves, or a line per trial where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorasweep.record import Direction
from lorasweep.sweep.definition import Arm, Definition
from lorasweep.sweep.folder import SweepFolder
from lorasweep.sweep.plan import ArmPlan
from lorasweep.wording import format_seconds


@dataclass(kw_only=True)
class ArmProgress:
    """How far an arm is."""

    asked: int
    done: int = 0
    pruned: int = 0
    lost: int = 0
    best: float | None = None
    best_params: Mapping[str, Any] | None = None
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
    """An observer that shows arms, the running trial, the best so far and the time left. A context manager."""

    def __init__(self, sweep: SweepFolder, *, console: Console) -> None:
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

    def trial_ended(self, arm: Arm, number: int, state: str, value: float | None, *, wall_s: float) -> None:
        """Counts the trial; without a terminal, prints its line."""
        progress, running = self.arms[arm.name], self.running.pop((arm.name, number), None)
        params = running.params if running else {}
        progress.done += 1
        progress.pruned += state == "pruned"
        progress.lost += state in ("failed", "infeasible")
        progress.seconds += wall_s
        if state == "complete" and value is not None and _beats(value, progress.best, direction=self.direction):
            progress.best, progress.best_params = value, dict(params)
        if not self.console.is_terminal:
            score = "-" if value is None else f"{value:.4f}"
            line = f"{arm.name} {progress.done}/{progress.asked}  {state:<10} {score:>8}  {describe_params(params)}"
            self.console.print(escape(line), highlight=False, soft_wrap=True)

    def render(self) -> RenderableType:
        """Returns the table as it stands."""
        table = Table(title=escape(self.title), title_justify="left", header_style="bold")
        for name in ("arm", "trials", "pruned", "best", "best settings", "time left"):
            table.add_column(name, justify="right" if name in ("trials", "pruned", "best", "time left") else "left")
        for name, arm in self.arms.items():
            best = "-" if arm.best is None else f"{arm.best:.4f}"
            done = f"{arm.done}/{arm.asked}" + (f" ({arm.lost} failed)" if arm.lost else "")
            left = arm.seconds_left
            table.add_row(
                escape(name),
                done,
                str(arm.pruned),
                best,
                escape(describe_params(arm.best_params or {})),
                "-" if left is None else format_seconds(left),
            )
        return Group(table, *map(_running_line, self.running.values()))


def render_plan(definition: Definition, plans: Sequence[ArmPlan]) -> RenderableType:
    """Returns what a sweep would take, an arm per row, with why its trials are packed or run alone."""
    table = Table(title=escape(f"{definition.name}: nothing is trained yet"), title_justify="left", header_style="bold")
    table.add_column("arm")
    for name in ("trials", "steps", "tokens", "trained", "pack", "memory", "disk", "at most"):
        table.add_column(name, justify="right")
    for plan in plans:
        table.add_row(
            escape(plan.arm.name),
            str(plan.arm.trials),
            f"{plan.steps:,}",
            f"{plan.tokens:,}",
            f"{plan.trainable_params:,}",
            str(plan.pack_size),
            f"{plan.memory_bytes / 2**20:,.0f} MiB",
            f"{plan.kept_bytes / 2**20:,.1f} MiB",
            format_seconds(plan.seconds),
        )
    total = format_seconds(sum(plan.seconds for plan in plans))
    notes = [f"• {plan.arm.name}: {plan.packing.reason}" for plan in plans]
    notes.append(f"• All arms: at most {total} on this machine, measured on a few steps; pruning takes less.")
    return Group(table, *map(Text, notes))


def _running_line(running: RunningTrial) -> Text:
    value = "" if running.value is None else f"  {running.value:.4f}"
    return Text(
        f"now: {running.arm.name} trial {running.number}  step {running.step}/{running.steps}{value}  "
        f"{describe_params(running.params)}  {format_seconds(time.monotonic() - running.started)}"
    )


def describe_params(params: Mapping[str, Any]) -> str:
    """Returns swept values in one line: `method.rank=8 optim.lr=0.0123`."""
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def _progress_so_far(sweep: SweepFolder, arm: Arm) -> ArmProgress:
    progress = ArmProgress(asked=arm.trials)
    for trial in (row for row in sweep.record.trials if row.arm == arm.name and row.state != "running"):
        progress.done += 1
        progress.pruned += trial.state == "pruned"
        progress.lost += trial.state in ("failed", "infeasible")
        complete = trial.state == "complete" and trial.value is not None
        if complete and _beats(trial.value, progress.best, direction=sweep.record.direction):  # type: ignore[arg-type]
            progress.best, progress.best_params = trial.value, trial.params
    return progress


def _beats(value: float, best: float | None, *, direction: Direction) -> bool:
    return best is None or (value < best if direction == "minimize" else value > best)
