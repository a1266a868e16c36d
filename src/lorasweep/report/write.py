"""Writes a sweep's report into `report/` in its folder: CSV, JSON, the HTML page and TensorBoard's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasweep.disk import csv_text, write_atomically
from lorasweep.report.board import BOARD_FOLDER, write_board
from lorasweep.report.figures import draw_panels
from lorasweep.report.page import render_page
from lorasweep.report.recommend import RECOMMENDED_FILES
from lorasweep.report.summary import Summary, summarize
from lorasweep.report.sweep_data import ALPHA, LR, RANK, ArmData, TrialData

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
QUESTION_FIELDS = (
    *("name", "arm", "subject", "reference", "verdict", "value", "is_share", "num_seeds", "open_because", "to_settle"),
)
"""The columns of `questions.csv` that are fields of an `Answer`, beside the ends of its interval."""


def write_report(folder: Path) -> Summary:
    """Writes a sweep's report into `report/` in its folder, each file whole or not at all, and returns its content.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged. Nothing is written then.
    """
    summary = summarize(folder)
    data = summary.data
    files = {
        "trials.csv": _trials_csv(summary),
        "curves.csv": csv_text(
            ["arm", "trial", "step", data.record.metric],
            ([trial.arm, trial.number, *point] for trial in data.trials for point in trial.curve),
        ),
        "summary.json": json.dumps(summary.as_json(), indent=1) + "\n",
        "index.html": render_page(summary, draw_panels(data)),
    }
    if data.confirm_runs:
        files["confirmed.csv"] = csv_text(
            ["arm", "subject", "seed", data.record.metric, "state", "run"],
            ([run.arm, run.subject, run.seed, run.value, run.state, run.run] for run in data.confirm_runs),
        )
    if data.evidence.answers:
        files["questions.csv"] = csv_text(
            [*QUESTION_FIELDS, "low", "high"],
            (
                [*(getattr(answer, name) for name in QUESTION_FIELDS), *(answer.interval or (None, None))]
                for answer in data.evidence.answers
            ),
        )
    for name, content in files.items():
        write_atomically(folder / REPORT_FOLDER / name, content)
    _write_recommended(summary, folder / REPORT_FOLDER / RECOMMENDED_FOLDER)
    write_board(data, summary.answers, folder / REPORT_FOLDER / BOARD_FOLDER)
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


def _trials_csv(summary: Summary) -> str:
    """Returns one line per trial: its state, its settings by dotted key, its score and its cost."""
    data, learning = summary.data, summary.learning
    keys = tuple(dict.fromkeys([*data.swept_keys, RANK, ALPHA, LR]))
    header = ["arm", "method", "trial", "state", data.record.metric, "share_of_full_gain", "is_better_than_untrained"]

    def cells(arm: ArmData, trial: TrialData) -> list[Any]:
        return [
            *(arm.name, arm.row.method, trial.number, trial.state, trial.value),
            *(data.share_of_full_gain(trial.value), learning.is_better(trial, sign=data.sign)),
            *(trial.setting(key) for key in keys),
            *(getattr(trial.record, name, None) for name in MEASURED),
            trial.record.best.get("step") if trial.record else None,
            *(trial.run, trial.reason),
        ]

    rows = (cells(arm, trial) for arm in data.searches for trial in arm.trials)
    return csv_text([*header, *keys, *MEASURED, "best_step", "run", "reason"], rows)
