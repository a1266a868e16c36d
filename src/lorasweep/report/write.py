"""Writes a sweep's report into `report/` in its folder: CSV, JSON, the HTML page and TensorBoard's board.

Last of this package: everything else here makes content, this puts it on disk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.disk import csv_text, write_atomically
from lorasweep.report.board import BOARD_FOLDER, write_board
from lorasweep.report.figures import PANELS, Panel
from lorasweep.report.page import render_page
from lorasweep.report.summary import Summary, summarize
from lorasweep.report.tables import SweepData, Trial, load_sweep_data

REPORT_FOLDER = "report"
MEASURED = (
    "steps_planned",
    "steps_done",
    "tokens_trained",
    "tokens_per_s",
    "wall_s",
    "trainable_params",
    "trainable_fraction",
    "adapter_bytes",
    "peak_memory_bytes",
)
"""Columns of `trials.csv` that a run's record holds under the same name."""
PAIR_COLUMNS = (
    *("first", "second", "verdict", "difference", "low", "high"),
    *("p_value", "adjusted_p_value", "smallest_visible", "num_seeds", "uses_examples"),
)


def write_report(folder: Path) -> Summary:
    """Writes a sweep's report into `report/` in its folder, each file whole or not at all, and returns the summary.

    Raises:
        RecordError: The folder is not a sweep or its record is damaged. Nothing is written then.
    """
    data = load_sweep_data(folder)
    summary = summarize(data)
    panels = [draw(data) for draw in PANELS]
    report = folder / REPORT_FOLDER
    for name, content in _files(data, panels).items():
        write_atomically(report / name, content)
    write_atomically(report / "summary.json", json.dumps(summary.as_json(), indent=1) + "\n")
    write_atomically(report / "index.html", render_page(data, summary, panels))
    write_board(data, summary, report / BOARD_FOLDER)
    return summary


def _files(data: SweepData, panels: Sequence[Panel]) -> dict[str, str]:
    """Returns the data files by name: trials, curves, pairs, and what each figure shows."""
    files = {f"{panel.key}.csv": csv_text(list(panel.columns), panel.rows) for panel in panels if panel.rows}
    pairs = {"pairs.csv": pairscsv_text(data)} if data.evidence.pairs else {}
    return {"trials.csv": trialscsv_text(data), "curves.csv": curvescsv_text(data), **pairs, **files}


def pairscsv_text(data: SweepData) -> str:
    """Returns one line per pair of arms: difference, interval, p values and verdict."""
    rows = (
        [
            *(pair.first, pair.second, pair.verdict, pair.difference),
            *(pair.interval or (None, None)),
            *(pair.p_value, pair.adjusted_p_value, pair.smallest_visible, pair.num_seeds, pair.uses_examples),
        ]
        for pair in data.evidence.pairs
    )
    return csv_text([*PAIR_COLUMNS], rows)


def trialscsv_text(data: SweepData) -> str:
    """Returns one line per trial: what it was, how it ended, its swept settings by dotted key, what it cost."""
    header = [
        "arm",
        "method",
        "trial",
        "state",
        data.record.metric,
        "share_of_full_gain",
        *data.swept_keys,
    ]
    rows = (_trial_cells(trial, data) for trial in data.trials)
    return csv_text([*header, *MEASURED, "best_step", "run", "reason"], rows)


def curvescsv_text(data: SweepData) -> str:
    """Returns one line per evaluation: the data behind the learning curves."""
    rows = ([trial.arm, trial.number, step, value] for trial in data.trials for step, value in trial.curve)
    return csv_text(["arm", "trial", "step", data.record.metric], rows)


def _trial_cells(trial: Trial, data: SweepData) -> list[Any]:
    identity = [trial.arm, trial.method, trial.number, trial.state]
    score = [trial.value, data.share_of_full_gain(trial.value)]
    settings = [trial.setting(key) for key in data.swept_keys]
    measured = [getattr(trial.record, name, None) for name in MEASURED]
    best_step = trial.record.best.get("step") if trial.record else None
    return [*identity, *score, *settings, *measured, best_step, trial.run, trial.reason]
