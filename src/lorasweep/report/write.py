"""Writes a sweep's report into `report/` in its folder: CSV, JSON, the HTML page and TensorBoard's files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas

from lorasweep.disk import write_atomically
from lorasweep.report.figures import draw_panels
from lorasweep.report.page import render_page
from lorasweep.report.summary import Summary, summarize
from lorasweep.report.tensorboard import TENSORBOARD_FOLDER, write_tensorboard

REPORT_FOLDER = "report"


def write_report(folder: Path) -> Summary:
    """Writes a sweep's report into `report/` in its folder, each file whole or not at all, and returns its content.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged. Nothing is written then.
    """
    summary = summarize(folder)
    files = {
        "summary.json": json.dumps(summary.as_json(), indent=1) + "\n",
        "index.html": render_page(summary, draw_panels(summary.data)),
    }
    files |= {name: table.to_csv(index=False) for name, table in build_tables(summary).items()}
    for name, content in files.items():
        write_atomically(folder / REPORT_FOLDER / name, content)
    write_tensorboard(summary.data, summary.answers, folder / REPORT_FOLDER / TENSORBOARD_FOLDER)
    return summary


def build_tables(summary: Summary) -> dict[str, pandas.DataFrame]:
    """Returns the content of each CSV file: trials, their curves, and after a confirm stage its runs."""
    data, metric = summary.data, summary.data.record.metric
    trials, runs = data.frame.iloc[: len(data.trials)], data.frame.iloc[len(data.trials) :]
    trials = trials.drop(columns=["stage", "seed", "step", f"test/{metric}"], errors="ignore").assign(
        method=[arm.row.method for arm in data.searches for _ in arm.trials],
        share_of_full_gain=[data.share_of_full_gain(trial.value) for trial in data.trials],
        is_better_than_untrained=[summary.learning.is_better(trial) for trial in data.trials],
    )
    curves = [(trial.arm, trial.number, *point) for trial in data.trials for point in trial.curve]
    tables = {"trials.csv": trials, "curves.csv": pandas.DataFrame(curves, columns=["arm", "trial", "step", metric])}
    if data.confirm_runs:
        runs = runs[["arm", "subject", "seed", f"test/{metric}", "state", "run"]]
        tables["confirmed.csv"] = runs.rename(columns={f"test/{metric}": metric})
    if data.retained:
        changes = pandas.DataFrame.from_records([asdict(change) for change in data.retained])
        ends = [interval or (None, None) for interval in changes.pop("interval")]
        changes["low"], changes["high"] = zip(*ends, strict=True)
        tables["retained.csv"] = changes
    return tables
