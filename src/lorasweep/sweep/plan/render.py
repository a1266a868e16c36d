"""Shows the plan of a sweep in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorasweep.selection import describe_confirmation
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.bases import explain_bases
from lorasweep.sweep.definition.packing import explain_packing
from lorasweep.sweep.definition.warnings import find_warnings
from lorasweep.sweep.plan.estimate import SweepPlan
from lorasweep.sweep.plan.measure import count_workers
from lorasweep.wording import format_bytes, format_count, format_seconds_range, join_words


def render_plan(definition: Definition, plan: SweepPlan) -> RenderableType:
    """Returns a table with a row for each arm, followed by sentences on packs, stages, time, memory and warnings."""
    title = escape(f"{definition.name}: nothing is trained yet")
    # an arm's long name may wrap, but numbers never do
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE, padding=(0, 0))
    table.add_column("arm", overflow="fold")
    for name in ("runs", "steps", "tokens", "trained", "pack", "memory", "disk", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in plan.arms:
        table.add_row(
            escape(arm.arm.name),
            " + ".join(map(str, filter(None, (arm.arm.trials, arm.confirm_runs)))),
            format_count(arm.steps),
            format_count(arm.tokens),
            format_count(arm.trainable_params),
            str(arm.pack_size),
            format_bytes(arm.memory_bytes),
            format_bytes(arm.kept_bytes),
            format_seconds_range(arm.seconds.low, arm.seconds.high),
        )
    return Group(table, *(Text(f"• {note}") for note in _list_notes(definition, plan)))


def _list_notes(definition: Definition, plan: SweepPlan) -> Iterator[str]:
    yield from explain_bases(definition)
    yield from explain_packing(definition)
    for group in plan.cost.groups:
        if group.pack_note:
            yield f"{', '.join(f'`{arm.name}`' for arm in group.arms)}: {group.pack_note}"
    yield _describe_stages(definition)
    yield from find_warnings(definition)
    parts = [f"{name} {format_seconds_range(time.low, time.high)}" for name, time in plan.stages.items() if time.high]
    workers = count_workers(definition)
    shared = f" {workers} workers share this time." if workers > 1 else ""
    total = format_seconds_range(plan.total.low, plan.total.high)
    yield (
        f"Time on this machine, if it does nothing else: {total} ({', '.join(parts)}). The lower end prunes all that "
        f"the stopping rule allows; the upper end prunes nothing.{shared}"
    )
    yield f"Largest memory of the process: {format_bytes(plan.host_bytes)}, in {plan.largest_moment}."
    if plan.cost.omitted_loggers:
        yield f"The time of {join_words(plan.cost.omitted_loggers)} (`logger`) is not measured."


def _describe_stages(definition: Definition) -> str:
    looks = definition.sweep_config.confirm.list_looks()
    confirm = f"then confirm: {describe_confirmation(looks)}" if looks else "no confirm stage"
    return f"Stages (the numbers of runs): search on validation data; {confirm}."
