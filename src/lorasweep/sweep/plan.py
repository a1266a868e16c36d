"""The plan of a sweep: its runs, tokens, trained parameters, memory, disk and time, and its warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.record import describe_confirmation
from lorasweep.sweep.assess import Assessment
from lorasweep.sweep.cost import Rates, count_workers, describe_cores, describe_load, estimate_cost
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.definition.confirm import count_confirm_runs
from lorasweep.wording import format_bytes, format_count, format_seconds_range

MAX_NAME_WIDTH = 16
"""Longest name of an arm that never wraps in 80 columns."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The cost of a sweep, and the notes on it."""

    definition: Definition
    """The sweep, cut if it must fit a time."""
    rates: tuple[Rates, ...]
    """Measured time and memory of the trainings, for each group of arms that share packs."""
    assessment: Assessment
    given_up: str = ""
    """What was cut for `--minutes`, in a sentence."""

    def as_json(self) -> dict[str, Any]:
        """Returns what `lorasweep plan --json` prints."""
        groups = [_describe_group(self.definition, group) for group in self.rates]
        return {"name": self.definition.name, "groups": groups, "notes": [note.text for note in self.assessment.shown]}


def _describe_group(definition: Definition, rates: Rates) -> dict[str, Any]:
    config, cost = definition.find_arm(rates.arms[0]).base, estimate_cost(definition, [rates])
    return {
        **vars(rates),
        "run_s": rates.estimate_run_s(config.num_steps, config.trainer.eval_every_steps),
        "search_s": [cost.search_low_s, cost.search_high_s],
    }


def render_plan(definition: Definition, rates: Sequence[Rates]) -> RenderableType:
    """Returns a table with a row for each arm, followed by sentences on packs, stages, time, memory and warnings."""
    metric = rates[0].metric
    key = "data.metric" if definition.arms[0].base.module is None else "metric.name"
    title = f"{definition.name}: scored by {metric} (`{key}`), nothing is trained yet"
    # an arm's name may wrap if it is very long, but numbers never do
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE, padding=(0, 0))
    longest = max(len(arm.name) for arm in definition.arms)
    table.add_column("arm", overflow="fold", min_width=min(MAX_NAME_WIDTH, longest))
    for name in ("runs", "tokens", "trained", "pack", "memory", "disk", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    seeds = next(iter(definition.sweep_config.confirm.list_looks()), 0)
    confirm_runs = {arm.name: count_confirm_runs(arm, seeds=seeds) for arm in definition.arms}
    num_runs = {arm.name: arm.trials + confirm_runs[arm.name] for arm in definition.arms}
    for arm in definition.arms:
        group = next(group for group in rates if arm.name in group.arms)
        cost, runs = estimate_cost(definition, [group]), num_runs[arm.name]
        trained = group.trained_params[arm.name]
        share = runs / sum(num_runs[name] for name in group.arms)
        at_most = "≤ " if len({getattr(config.method, "rank", 0) for config in arm.corner_configs}) > 1 else ""
        table.add_row(
            arm.name,
            " + ".join(map(str, filter(None, (arm.trials, confirm_runs[arm.name])))),
            format_count(runs * arm.base.num_steps * group.step_tokens),
            at_most + format_count(trained),
            str(group.slots),
            format_bytes(group.peak_memory_bytes),
            at_most + format_bytes(runs * 4 * trained),  # its best trained weights, in fp32
            format_seconds_range(share * cost.low_s, share * cost.high_s),
        )
    beside = (describe_cores(definition), describe_load(rates))
    return Group(
        *(Text(f"warning: {sentence}") for sentence in beside if sentence),
        table,
        *(Text(f"• {note}") for note in _list_notes(definition, rates)),
    )


def _list_notes(definition: Definition, rates: Sequence[Rates]) -> Iterator[str]:
    for group in rates:
        if group.reason:
            yield f"{', '.join(f'`{name}`' for name in group.arms)}: {group.reason}"
    looks = definition.sweep_config.confirm.list_looks()
    confirm_stage = f"then confirm: {describe_confirmation(looks)}" if looks else "no confirm stage"
    yield f"Stages (the numbers of runs): search on validation data; {confirm_stage}."
    cost, longest = estimate_cost(definition, rates), estimate_cost(definition, rates, look=-1)
    total = format_seconds_range(cost.low_s, cost.high_s)
    parts = f"search {format_seconds_range(cost.search_low_s, cost.search_high_s)}"
    parts += f", confirm {format_seconds_range(cost.confirm_s, cost.confirm_s)}" if cost.confirm_s else ""
    range_note = " The upper end counts slots of packs that may stay empty." if " to " in total else ""
    workers = count_workers(definition)
    where = f"with {workers} workers as fast as this machine" if workers > 1 else "on this machine"
    condition = "as busy as when it was measured" if describe_load(rates) else "if it does nothing else"
    yield f"Time {where}, {condition}: {total} ({parts}).{range_note}"
    if longest.confirm_s > cost.confirm_s:
        yield f"If every question stays open to the last look: {format_seconds_range(longest.low_s, longest.high_s)}."
