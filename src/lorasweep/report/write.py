"""Writes a sweep's report into `report/` in its folder: CSV, JSON, the HTML page and TensorBoard's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasweep.disk import csv_text, write_atomically
from lorasweep.report.board import BOARD_FOLDER, write_board
from lorasweep.report.figures import PANELS
from lorasweep.report.page import render_page
from lorasweep.report.recommend import RECOMMENDED_FILES
from lorasweep.report.summary import Summary, summarize
from lorasweep.report.sweep_data import ALPHA, LR, RANK, ArmData, SweepData, TrialData

REPORT_FOLDER = "report"
RECOMMENDED_FOLDER = "recommended"
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
    *("first", "second", "verdict", "reason", "difference", "p_value", "adjusted_p_value", "equivalence_p_value"),
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
    files = {
        "trials.csv": _trials_csv(data),
        "curves.csv": csv_text(
            ["arm", "trial", "step", data.record.metric],
            ([trial.arm, trial.number, *point] for trial in data.trials for point in trial.curve),
        ),
        "summary.json": json.dumps(summary.as_json(), indent=1) + "\n",
        "index.html": render_page(summary, panels),
    }
    if data.confirm_runs:
        files["confirmed.csv"] = csv_text(
            ["arm", "trial", "seed", data.record.metric, *data.harness_scores, "state", "run"],
            (
                [
                    *(rerun.arm, rerun.number, rerun.seed, rerun.value),
                    *(rerun.record.harness.get(name) if rerun.record else None for name in data.harness_scores),
                    *(rerun.state, rerun.run),
                ]
                for rerun in data.confirm_runs
            ),
        )
        files["pairs.csv"] = csv_text(
            [*PAIR_FIELDS, "low", "high", "settled_by", "more_seeds"],
            (
                [
                    *(getattr(pair, name) for name in PAIR_FIELDS),
                    *(pair.interval or (None, None)),
                    *((pair.settled_by.kind, pair.settled_by.more_seeds) if pair.settled_by else (None, None)),
                ]
                for pair in data.evidence.pairs
            ),
        )
    for name, content in files.items():
        write_atomically(folder / REPORT_FOLDER / name, content)
    _write_recommended(summary, folder / REPORT_FOLDER / RECOMMENDED_FOLDER)
    write_board(data, panels, folder / REPORT_FOLDER / BOARD_FOLDER)
    return summary


def _write_recommended(summary: Summary, folder: Path) -> None:
    """Writes the files of the recommended settings, and in `lora/` those for LoRA if another method is recommended."""
    for index, target in enumerate((folder, folder / "lora")):
        files = summary.recommended[index].files if index < len(summary.recommended) else {}
        for name in RECOMMENDED_FILES:
            if name in files:
                write_atomically(target / name, files[name])
            else:  # an earlier report may have recommended another method
                (target / name).unlink(missing_ok=True)


def _trials_csv(data: SweepData) -> str:
    """Returns one line per trial: its state, its settings by dotted key, its score and its cost."""
    keys = tuple(dict.fromkeys([*data.swept_keys, RANK, ALPHA, LR]))
    header = ["arm", "method", "trial", "state", data.record.metric, "share_of_full_gain"]

    def cells(arm: ArmData, trial: TrialData) -> list[Any]:
        return [
            *(arm.name, arm.row.method, trial.number, trial.state, trial.value),
            data.share_of_full_gain(trial.value),
            *(trial.setting(key) for key in keys),
            *(getattr(trial.record, name, None) for name in MEASURED),
            trial.record.best.get("step") if trial.record else None,
            *(trial.run, trial.reason),
        ]

    rows = (cells(arm, trial) for arm in data.arms for trial in arm.trials)
    return csv_text([*header, *keys, *MEASURED, "best_step", "run", "reason"], rows)
