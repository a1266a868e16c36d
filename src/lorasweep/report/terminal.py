"""The report in the terminal (rich): the arms of one sweep, or several sweeps side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.report.summary import Summary, summarize
from lorasweep.report.sweep_data import ArmData, SweepData
from lorasweep.wording import (
    UNKNOWN,
    format_bytes,
    format_count,
    format_estimate,
    format_metric,
    format_score,
    format_seconds,
    format_settings,
    format_share,
    format_share_estimate,
)

MAX_COLUMNS = 4
"""Up to this many arms are columns of the table. More arms are rows."""
BOLD_ROWS = ("arm", "test score", "search score")
MANY_ARMS_COLUMNS = ("arm", "best settings", "test score", "search score", "of full's gain", "trained")
"""The columns if arms are rows, which must fit a terminal of 80 characters. The page has the others."""


def render_terminal(*folders: Path) -> RenderableType:
    """Returns the results of the sweeps in these folders: a table and sentences, of several sweeps side by side.

    Raises:
        RecordError: A folder is not a sweep, or its record is damaged.
    """
    summaries = [summarize(folder) for folder in folders]
    if len(summaries) == 1:
        table = _draw_arms(summaries[0])
        sentences = [*summaries[0].sentences, *summaries[0].data.problems]
    else:
        table = _draw_side_by_side([summary.data for summary in summaries])
        sentences = describe_differences([summary.data for summary in summaries])
    failures = [
        Text(headline if len(summaries) == 1 else f"{summary.data.folder}: {headline}", style="bold red")
        for summary in summaries
        if (headline := summary.learning.headline)
    ]
    return Group(*failures, table, *(Text(f"• {sentence}") for sentence in sentences))


def describe_differences(sweeps: Sequence[SweepData]) -> list[str]:
    """Returns the reasons why scores of the sweeps can't be compared, and a sentence about tests between sweeps."""
    traits: dict[str, list[str | None]] = {
        "metrics": [sweep.record.metric for sweep in sweeps],
        "test data": [_find_fingerprint(sweep, "data", "test") for sweep in sweeps],
        "validation data": [_find_fingerprint(sweep, "data", "validation") for sweep in sweeps],
        "base models": [_find_fingerprint(sweep, "base") for sweep in sweeps],
    }
    sentences = [
        f"The sweeps have different {name}: their scores can't be compared."
        for name, values in traits.items()
        if len({*values} - {None}) > 1
    ]
    tested = (
        "Arms were tested inside each sweep; differences between sweeps are not tested. "
        "A score without an interval is one seed on validation data."
    )
    return [*sentences, tested]


def _find_fingerprint(sweep: SweepData, *keys: str) -> str | None:
    """Returns the fingerprint of the data or the base model in the first run record that has one."""
    for record in (*(rerun.record for rerun in sweep.confirm_runs), *sweep.run_records):
        found = getattr(record, keys[0]) if record else {}
        for key in keys[1:]:
            found = found.get(key) or {}
        if found.get("fingerprint"):
            return str(found["fingerprint"])
    return None


def _draw_arms(summary: Summary) -> Table:
    data = summary.data
    title = Text(f"{data.record.name}: {format_metric(data.record.metric)}", style="bold")
    rows = _tabulate_arms(data)
    if len(data.arms) <= MAX_COLUMNS:
        table = Table(show_header=False, title=title, title_justify="left")
        table.add_column(style="dim")
        for _ in data.arms:
            table.add_column(justify="right", overflow="fold")
        for name, cells in rows.items():
            table.add_row(name, *(Text(cell, style="bold" if name in BOLD_ROWS else "") for cell in cells))
        return table
    table = Table(title=title, title_justify="left")
    rows = {name: cells for name, cells in rows.items() if name in MANY_ARMS_COLUMNS}
    for name in rows:
        is_text = name in ("arm", "best settings")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=name == "arm")
    for arm_cells in zip(*rows.values(), strict=True):
        table.add_row(*map(Text, arm_cells))
    return table


def _tabulate_arms(data: SweepData) -> dict[str, list[str]]:
    """Returns, per name of a quantity, a text for each arm."""
    arms = data.arms
    found = [data.evidence.arm(arm.name) for arm in arms]
    scores = [arm.best.value if arm.best else None for arm in arms]
    confirmed = [format_estimate(one.mean, one.interval) if one else UNKNOWN for one in found]
    return {
        "arm": [arm.name for arm in arms],
        "best settings": [format_settings(arm.best.params) if arm.best else "no complete trial" for arm in arms],
        **({"test score": confirmed} if data.evidence.arms else {}),
        **{name: [format_score(score, beside=row) for score in row] for name, row in data.harness_scores.items()},
        "search score": [format_score(score, beside=scores) for score in scores],
        "of full's gain": [format_share_estimate(*data.full_gain_share_of_arm(arm)) for arm in arms],
        "trained": [format_count(arm.cost("trainable_params")) for arm in arms],
        "of base": [format_share(arm.cost("trainable_fraction")) for arm in arms],
        "adapter": [format_bytes(arm.cost("adapter_bytes")) for arm in arms],
        "memory": [_describe_memory(arm) for arm in arms],
        "time": [format_seconds(arm.cost("wall_s")) for arm in arms],
        **(
            {"slots in use": [format_share(arm.occupancy) for arm in arms]}
            if any(arm.occupancy for arm in arms)
            else {}
        ),
        "trials": [arm.describe_states() for arm in arms],
    }


def _describe_memory(arm: ArmData) -> str:
    """Returns the memory of the best trial's run, or of its whole pack with the number of runs in it."""
    memory = format_bytes(arm.cost("peak_memory_bytes"))
    pack = arm.best.record.pack if arm.best and arm.best.record else None
    return f"{memory}, pack of {pack['slots']}" if pack else memory


def _draw_side_by_side(sweeps: Sequence[SweepData]) -> Table:
    table = Table(title="best of each arm", title_justify="left", show_lines=True)
    table.add_column("arm", overflow="fold")
    for sweep in sweeps:
        table.add_column(Text(f"{sweep.record.name}\n{sweep.folder}"), overflow="fold")
    for name in dict.fromkeys(arm.name for sweep in sweeps for arm in sweep.arms):
        cells = [
            next((_describe_best(arm, sweep) for arm in sweep.arms if arm.name == name), UNKNOWN) for sweep in sweeps
        ]
        table.add_row(Text(name), *map(Text, cells))
    return table


def _describe_best(arm: ArmData, data: SweepData) -> str:
    """Returns an arm's score, on test data if it was confirmed, its share of full's gain, and its settings."""
    if arm.best is None:
        return "no complete trial"
    found = data.evidence.arm(arm.name)
    searched = format_score(arm.best.value, beside=[other.best.value for other in data.arms if other.best])
    score = format_estimate(found.mean, found.interval) if found else searched
    share, interval = data.full_gain_share_of_arm(arm)
    gain = f"{format_share_estimate(share, interval)} of full's gain; " if share is not None else ""
    return f"{score}\n{gain}{format_settings(arm.best.params)}"
