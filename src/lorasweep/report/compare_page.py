"""Several sweeps side by side on one HTML page: one table, figures of all arms together, a section per sweep.

Comes after `page`, whose styles, script and tables it shares.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lorasweep.disk import write_atomically
from lorasweep.report.figures.panel import colours_of
from lorasweep.report.figures.together import draw_together
from lorasweep.report.page import load_template
from lorasweep.report.side_by_side import describe_cell, describe_differences
from lorasweep.report.summary import Summary, summarize
from lorasweep.report.tables import SweepData, load_sweep_data

COMPARE_FILE = "compare.html"
"""In the first sweep's `report/`."""


@dataclass(frozen=True, kw_only=True)
class PlacedSweep:
    """One sweep as the page shows it."""

    label: str
    """Its name, with its folder where another sweep has the same name."""
    prefix: str
    """The way from the page to the sweep's folder."""
    description: str
    summary: Summary
    colours: dict[str, str]
    problems: tuple[str, ...]


def write_comparison(folders: Sequence[Path], path: Path) -> None:
    """Writes the page; a page written before is replaced.

    Args:
        folders: Sweeps, each with its report.
        path: The file to write.

    Raises:
        RecordError: A folder is not a sweep or its record is damaged. Nothing is written then.
    """
    data = [load_sweep_data(folder) for folder in folders]
    write_atomically(path, render_comparison(data, path))


def render_comparison(data: Sequence[SweepData], path: Path) -> str:
    """Returns the page as HTML, with links as seen from `path`."""
    labels = label_sweeps(data)
    sweeps = [_place(sweep, label, path) for sweep, label in zip(data, labels, strict=True)]
    names = dict.fromkeys(arm.name for sweep in sweeps for arm in sweep.summary.arms)
    return load_template("compare.html").render(
        sweeps=sweeps,
        sentences=describe_differences(data),
        arms=[(name, [describe_cell(sweep.summary, name) for sweep in sweeps]) for name in names],
        panels=draw_together(data, labels, [sweep.prefix for sweep in sweeps]),
    )


def label_sweeps(data: Sequence[SweepData]) -> list[str]:
    """Returns what each sweep is called: its name, with the folder after it where names repeat."""
    names = [sweep.record.name for sweep in data]
    return [
        name if names.count(name) == 1 else f"{name} ({sweep.folder})" for name, sweep in zip(names, data, strict=True)
    ]


def _place(sweep: SweepData, label: str, path: Path) -> PlacedSweep:
    way = os.path.relpath(sweep.folder.resolve(), path.resolve().parent)
    return PlacedSweep(
        label=label,
        prefix=quote(Path(way).as_posix()),
        description=sweep.record.description,
        summary=summarize(sweep),
        colours=colours_of(sweep),
        problems=sweep.problems,
    )
