"""How a sweep stands: one table, for the terminal of `lorasweep sweep` and for `lorasweep status`.

Everything shown comes from the sweep's record, so it does not matter which process trains. Reading the record's file
locks and changes nothing and needs no database.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorasweep.record import ArmRow, ConfirmRow, SweepRecord, TrialRow, best_trial, read_sweep
from lorasweep.sweep.controller.lifecycle import is_running
from lorasweep.sweep.definition.seeds import SEED_KEYS, describe_confirm
from lorasweep.wording import UNKNOWN, format_seconds, format_setting

MAX_SHOWN_RUNS = 16
"""How many of the running trials get a line below the table."""


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
    seeds_failed: int = 0
    """Failed or infeasible."""
    test_mean: float | None = None
    """Mean of the metric on test data over the seeds that are complete."""


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

    @property
    def seconds_left(self) -> float | None:
        """Time for the runs left at the pace so far; None before the first has ended."""
        asked = sum(arm.asked + arm.seeds_asked for arm in self.arms)
        done = sum(arm.done + arm.seeds_done for arm in self.arms)
        return self.record.makespan_s / done * (asked - done) if done else None


def read_status(folder: Path) -> SweepStatus:
    """Reads how a sweep stands.

    Raises:
        RecordError: The folder is no sweep, or its record is damaged.
    """
    return summarise(read_sweep(folder), folder, is_running=is_running(folder))


def summarise(record: SweepRecord, folder: Path, *, is_running: bool) -> SweepStatus:
    """Returns how a sweep stands, from its record."""
    trials: dict[str, list[TrialRow]] = defaultdict(list)
    reruns: dict[str, list[ConfirmRow]] = defaultdict(list)
    for trial in record.trials:
        trials[trial.arm].append(trial)
    for rerun in record.confirm:
        reruns[rerun.arm].append(rerun)
    return SweepStatus(
        folder=folder,
        record=record,
        is_running=is_running,
        arms=tuple(_arm_status(arm, record, trials[arm.name], reruns[arm.name]) for arm in record.arms),
    )


def render_status(status: SweepStatus) -> RenderableType:
    """Returns how a sweep stands: its arms, what runs now, and what to type to resume it where it was stopped."""
    record = status.record
    title = f"{record.name}: {record.metric} ({record.direction}), {record.status}"
    notes: list[str] = []
    if not status.is_over:
        notes += _running_lines(record)
        left = status.seconds_left
        expected = "" if left is None else f", about {format_seconds(left)} left at this pace"
        notes.append(f"{format_seconds(record.makespan_s)} so far{expected}")
    elif record.status != "complete":
        notes.append(f"• No process runs it. Type `lorasweep sweep --resume {status.folder}` to resume it.")
    return Group(Text(title, style="bold"), _arms_table(status), *map(Text, notes))


def describe_params(params: Mapping[str, Any]) -> str:
    """Returns swept values in one line: `method.rank=8 optim.lr=0.0123`."""
    return " ".join(f"{key}={format_setting(value)}" for key, value in params.items())


def ended_rows(record: SweepRecord) -> Iterator[TrialRow | ConfirmRow]:
    """Yields the trials of both stages that have ended."""
    return (row for row in _rows(record) if row.state not in ("running", "paused"))


def _rows(record: SweepRecord) -> Iterator[TrialRow | ConfirmRow]:
    """Every run of the search and the confirm stage."""
    yield from record.trials
    yield from record.confirm


def _running_lines(record: SweepRecord) -> Iterator[str]:
    steps_of = {arm.name: arm.steps for arm in record.arms}
    running = [row for row in _rows(record) if row.state == "running"]
    if record.confirm:
        yield f"confirm: {describe_confirm(len(record.confirm_seeds))}"
    for row in islice(running, MAX_SHOWN_RUNS):
        params = params_of(row, record)
        steps = params.get("trainer.max_steps", steps_of.get(row.arm))
        name = f"trial {row.number}" if isinstance(row, TrialRow) else "confirm"
        value = "" if row.last_value is None else f"  {row.last_value:.4f}"
        yield f"now: {row.arm} {name}  step {row.step}{f'/{steps}' if steps else ''}{value}  {describe_params(params)}"
    if len(running) > MAX_SHOWN_RUNS:
        yield f"now: {len(running) - MAX_SHOWN_RUNS} more"


def params_of(row: TrialRow | ConfirmRow, record: SweepRecord) -> dict[str, Any]:
    """Returns the swept values of a run; in the confirm stage those of the arm's best trial, and the seed."""
    if isinstance(row, TrialRow):
        return row.params
    for trial in record.trials:
        if (trial.arm, trial.number) == (row.arm, row.trial):
            return {**{key: value for key, value in trial.params.items() if key not in SEED_KEYS}, "seed": row.seed}
    return {"seed": row.seed}


def _arms_table(status: SweepStatus) -> Table:
    confirms = any(arm.seeds_asked for arm in status.arms)
    tested = any(arm.test_mean is not None for arm in status.arms)
    table = Table(header_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    columns = ["trials", "running", "paused", "pruned", "failed", *(["confirm"] if confirms else []), "best"]
    for name in [*columns, *(["test"] if tested else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best settings", overflow="fold")
    for arm in status.arms:
        table.add_row(
            escape(arm.name),
            f"{arm.done}/{arm.asked}",
            str(arm.running + arm.seeds_running),
            str(arm.paused),
            str(arm.pruned),
            str(arm.failed + arm.seeds_failed),
            *([f"{arm.seeds_done}/{arm.seeds_asked}"] if confirms else []),
            _score(arm.best),
            *([_score(arm.test_mean)] if tested else []),
            escape(describe_params(arm.best_params)),
        )
    return table


def _score(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _arm_status(arm: ArmRow, record: SweepRecord, trials: list[TrialRow], reruns: list[ConfirmRow]) -> ArmStatus:
    states, seed_states = [trial.state for trial in trials], [rerun.state for rerun in reruns]
    best = best_trial(trials, direction=record.direction)
    seeds = record.confirm_seeds
    tested = [rerun.value for rerun in reruns if rerun.state == "complete" and rerun.value is not None]
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
        seeds_asked=len(seeds[:1] if arm.method == "frozen" else seeds),
        seeds_done=len(seed_states) - seed_states.count("running"),
        seeds_running=seed_states.count("running"),
        seeds_failed=seed_states.count("failed") + seed_states.count("infeasible"),
        test_mean=sum(tested) / len(tested) if tested else None,
    )
