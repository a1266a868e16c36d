"""Writes a sweep's report into `report/` in its folder: CSV, JSON, the HTML page and TensorBoard's board."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasweep.disk import csv_text, write_atomically
from lorasweep.report.board import BOARD_FOLDER, write_board
from lorasweep.report.figures import PANELS
from lorasweep.report.page import render_page
from lorasweep.report.summary import Summary, summarize
from lorasweep.report.sweep_data import SweepData, TrialData

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
"""The columns of `trials.csv` that a run's record holds under the same name."""

PAIR_FIELDS = (
    *("first", "second", "verdict", "reason", "difference", "p_value", "adjusted_p_value", "minimum_detectable"),
    *("num_seeds", "uses_examples"),
)


def write_report(folder: Path) -> Summary:
    """Writes a sweep's report into `report/` in its folder, each file whole or not at all, and returns its content.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged. Nothing is written then.
    """
    summary = summarize(folder)
    data = summary.data
    panels = [draw(data) for draw in PANELS]
    files = {"trials.csv": _trials_csv(data), "curves.csv": _curves_csv(data)}
    if data.evidence.pairs:
        files["pairs.csv"] = _pairs_csv(data)
    files |= {f"{panel.key}.csv": csv_text(panel.columns, panel.rows) for panel in panels if panel.rows}
    files["summary.json"] = json.dumps(summary.as_json(), indent=1) + "\n"
    files["index.html"] = render_page(summary, panels)
    for name, content in files.items():
        write_atomically(folder / REPORT_FOLDER / name, content)
    write_board(summary, folder / REPORT_FOLDER / BOARD_FOLDER)
    return summary


def _pairs_csv(data: SweepData) -> str:
    """Returns one line per pair of arms: the verdict, the difference, its interval and its p values."""
    rows = (
        [*(getattr(pair, name) for name in PAIR_FIELDS), *(pair.interval or (None, None))]
        for pair in data.evidence.pairs
    )
    return csv_text([*PAIR_FIELDS, "low", "high"], rows)


def _trials_csv(data: SweepData) -> str:
    """Returns one line per trial: its state, its swept settings by dotted key, its score and its cost."""
    header = ["arm", "method", "trial", "state", data.record.metric, "share_of_full_gain"]
    rows = (_trial_cells(trial, data) for trial in data.trials)
    return csv_text([*header, *data.swept_keys, *MEASURED, "best_step", "run", "reason"], rows)


def _trial_cells(trial: TrialData, data: SweepData) -> list[Any]:
    return [
        *(trial.arm, trial.method, trial.number, trial.state),
        *(trial.value, data.share_of_full_gain(trial.value)),
        *(trial.setting(key) for key in data.swept_keys),
        *(getattr(trial.record, name, None) for name in MEASURED),
        trial.record.best.get("step") if trial.record else None,
        *(trial.run, trial.reason),
    ]


def _curves_csv(data: SweepData) -> str:
    """Returns one line per evaluation."""
    rows = ([trial.arm, trial.number, step, value] for trial in data.trials for step, value in trial.curve)
    return csv_text(["arm", "trial", "step", data.record.metric], rows)
