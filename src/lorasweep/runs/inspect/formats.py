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
from lorasweep.runs.inspect.inspect_sweep import SweepInspection
from lorasweep.runs.inspect.inspection import LAYER_HEADER, Inspection, content_of, layers_csv
from lorasweep.runs.inspect.layers import LayerChange, relative_norm, shares_by
from lorasweep.runs.inspect.truncation import Truncation
from lorasweep.wording import UNKNOWN, format_metric, format_score, format_share

MAX_KINDS = 16
"""The table has a row for this many kinds of layer, those that changed most, and one row for all others."""


def render_inspection(found: Inspection | SweepInspection) -> RenderableType:
    """Returns the tables and sentences of a run, or of every winner of a sweep."""
    if isinstance(found, Inspection):
        return _render_run(found)
    parts: list[RenderableType] = []
    for arm, one in found.inspections.items():
        parts += [Text(f"{arm}: {one.run.folder}", style="bold"), _render_run(one), Text()]
    return Group(*parts, *map(_bullet, found.sentences))


def as_json(found: Inspection | SweepInspection) -> str:
    """Returns the summary, every layer and every rank as JSON; for a sweep by arm."""
    if isinstance(found, Inspection):
        content = content_of(found)
    else:
        arms = {arm: content_of(one) for arm, one in found.inspections.items()}
        content = {"arms": arms, "sentences": list(found.sentences)}
    return json.dumps(content, indent=1) + "\n"


def as_csv(found: Inspection | SweepInspection) -> str:
    """Returns a line for each changed weight; for a sweep the first column is the arm."""
    if isinstance(found, Inspection):
        return layers_csv(found.layers)
    rows = ([arm, *asdict(row).values()] for arm, one in found.inspections.items() for row in one.layers)
    return csv_text(["arm", *LAYER_HEADER], rows)


def _render_run(inspection: Inspection) -> RenderableType:
    parts: list[RenderableType] = [_layer_table(inspection)]
    if inspection.truncation is not None:
        parts.append(_truncation_table(inspection.truncation, inspection.run.record.metric))
    return Group(*parts, *map(_bullet, inspection.sentences))


def _layer_table(inspection: Inspection) -> Table:
    table = Table(title="changes by kind of layer (medians)", title_justify="left")
    table.add_column("layers", no_wrap=True)
    for name in ("share", "of base", "effective rank", "stable rank", "90 % in", "times base"):
        table.add_column(name, justify="right")
    for name, rows in _groups(inspection.layers).items():
        if rows:
            table.add_row(Text(f"{len(rows)} {name}"), *_kind_cells(rows))
    return table


def _groups(rows: Sequence[LayerChange]) -> dict[str, list[LayerChange]]:
    """Returns matrices by kind, in one group those of small kinds, and in one group weights without a rank."""
    matrices = [row for row in rows if row.effective_rank is not None]
    names = list(shares_by(matrices, "kind"))
    groups = {kind: [row for row in matrices if row.kind == kind] for kind in names[:MAX_KINDS]}
    groups["other matrices"] = [row for row in matrices if row.kind in names[MAX_KINDS:]]
    groups["norms, biases"] = [row for row in rows if row.effective_rank is None]
    return groups


def _kind_cells(rows: Sequence[LayerChange]) -> list[str]:
    return [
        format_share(sum(row.norm_share for row in rows)),
        format_share(relative_norm(rows)),
        _median([row.effective_rank for row in rows], digits=1),
        _median([row.stable_rank for row in rows], digits=1),
        _median([row.energy_rank for row in rows], digits=0),
        _median([row.amplification for row in rows], digits=2),
    ]


def _median(values: Sequence[float | None], *, digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.{digits}f}" if known else UNKNOWN


def _truncation_table(truncation: Truncation, metric: str) -> Table:
    table = Table(title="cut to a smaller rank", title_justify="left")
    for name in ("rank", format_metric(metric), "loss", "gain kept", "squared norm kept"):
        table.add_column(name, justify="right")
    for row in truncation.scores:
        style = "bold" if row is truncation.enough else ""
        cells = [str(row.rank), format_score(row.score), format_score(truncation.loss(row))]
        cells += [format_share(truncation.kept(row)), format_share(row.norm_share)]
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def _bullet(sentence: str) -> Text:
    return Text(f"• {sentence}")
