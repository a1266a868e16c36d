"""An inspection as rich tables with sentences, as JSON and as CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.disk import csv_text
from lorasweep.runs.inspect.inspect_run import Inspection, summarize, table_csv
from lorasweep.runs.inspect.inspect_sweep import SweepInspection
from lorasweep.runs.inspect.measures import LayerRow, relative_norm
from lorasweep.wording import UNKNOWN, format_share


def render_inspection(found: Inspection | SweepInspection) -> RenderableType:
    """Returns the tables and sentences of a run, or of every winner of a sweep."""
    if isinstance(found, Inspection):
        return Group(_layer_table(found.layers), *map(_bullet, found.sentences))
    parts: list[RenderableType] = []
    for arm, inspection in found.inspections.items():
        title = Text(f"{arm}: {inspection.run.folder}", style="bold")
        parts += [title, render_inspection(inspection), Text()]
    return Group(*parts, *map(_bullet, found.sentences))


def as_json(found: Inspection | SweepInspection) -> str:
    """Returns the summary and every layer as JSON. For a sweep, they are grouped by arm."""
    if isinstance(found, Inspection):
        content = _content(found)
    else:
        arms = {arm: _content(inspection) for arm, inspection in found.inspections.items()}
        content = {"arms": arms, "sentences": list(found.sentences)}
    return json.dumps(content, indent=1) + "\n"


def _content(inspection: Inspection) -> dict[str, object]:
    return {**summarize(inspection), "by_layer": [asdict(row) for row in inspection.layers]}


def as_csv(found: Inspection | SweepInspection) -> str:
    """Returns a line for each updated weight; for a sweep the first column is the arm."""
    if isinstance(found, Inspection):
        return table_csv(found.layers)
    rows = [{"arm": arm, **asdict(row)} for arm, one in found.inspections.items() for row in one.layers]
    return csv_text(list(rows[0]), (row.values() for row in rows))


def _layer_table(layers: Sequence[LayerRow]) -> Table:
    table = Table(title="updates by kind of layer (medians)", title_justify="left")
    table.add_column("layers", no_wrap=True)
    for name in ("share", "of base", "90 % in", "times base"):
        table.add_column(name, justify="right")
    groups: dict[str, list[LayerRow]] = {}
    for row in layers:
        groups.setdefault(row.kind if row.energy_rank is not None else "norms, biases", []).append(row)
    shares = {name: sum(row.norm_share for row in rows) for name, rows in groups.items()}
    for name in sorted(groups, key=shares.__getitem__, reverse=True):
        rows = groups[name]
        table.add_row(
            Text(f"{len(rows)} {name}"),
            format_share(shares[name]),
            format_share(relative_norm(rows)),
            _median([row.energy_rank for row in rows], digits=0),
            _median([row.amplification for row in rows], digits=2),
        )
    return table


def _median(values: Sequence[float | None], *, digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.{digits}f}" if known else UNKNOWN


def _bullet(sentence: str) -> Text:
    return Text(f"• {sentence}")
