"""Writes a sweep's report into `report/` in its folder: CSV, JSON, the HTML page and TensorBoard's files.

TensorBoard shows a row in HParams for each trial, one chart with the best curve of each arm, and the answers as text.
This needs TensorBoard alone, neither TensorFlow nor torch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary as EventSummary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from lorasweep.config.redaction import redact
from lorasweep.config.run import ALPHA, LR, RANK
from lorasweep.disk import is_running, require_no_links, write_atomically
from lorasweep.record import Trial, build_frame, is_number
from lorasweep.report import text
from lorasweep.report.evidence.verdicts import Answer
from lorasweep.report.facts import Findings, list_subject_rows
from lorasweep.report.figures import draw_panels
from lorasweep.report.page import render_page
from lorasweep.report.sweep_data import SweepData
from lorasweep.report.terminal import list_lines

REPORT_FOLDER = "report"

Value = EventSummary.Value
TENSORBOARD_FOLDER = "tensorboard"
"""The folder in a sweep's `report/`. `arms/` has the answers and a folder per arm, `trials/` a folder per trial.
TensorBoard selects no run if there are more than 40, so `arms/` must be useful alone."""
EVENT_FILE_SUFFIX = ".lorasweep"
"""Suffix of our event files. A later call finds and replaces the files with this suffix."""
ARM_TAG = "best trial of each arm"
"""The group of the arms' curves. All arms have the same tag, so that TensorBoard draws them in one chart."""
COST_METRICS = ("trainable_params", "peak_memory_bytes", "wall_s")
"""Fields of a run's record that are metrics of its row."""


def write_report(findings: Findings) -> None:
    """Writes a sweep's report into `report/` in its folder, each file whole or not at all.

    >>> lorasweep.write_report(lorasweep.load_sweep("outputs/tiny").findings)

    Raises:
        RecordError: `report/` has links. Nothing is written then.
    """
    folder = findings.data.folder / REPORT_FOLDER
    require_no_links(folder)
    files = {
        "summary.json": json.dumps(build_summary(findings), indent=1) + "\n",
        "index.html": render_page(findings, draw_panels(findings.data)),
    }
    files |= {name: table.to_csv(index=False) for name, table in build_tables(findings).items()}
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_tensorboard(findings, folder / TENSORBOARD_FOLDER)


def build_summary(findings: Findings) -> dict[str, Any]:
    """Returns the content of `report/summary.json`."""
    data, record, runs = findings.data, findings.data.record, findings.data.run_records
    evidence = data.evidence
    headline, remedy = text.describe_failure(findings)
    return {
        "sweep": record.name,
        "status": record.find_state(is_running=is_running(data.folder)),
        "headline": headline,
        "remedy": remedy,
        "answers": [_build_answer(answer, data) for answer in findings.answers],
        "warnings": text.list_warnings(findings),
        "learning": asdict(findings.learning),
        "metric": record.search_metric.name,
        "direction": record.search_metric.direction,
        "test_metrics": [asdict(metric) for metric in record.test_metrics],
        "makespan_s": record.makespan_s,
        "tokens_trained": data.tokens_trained,
        "steps_planned": sum(run.steps_planned for run in runs),
        "steps_done": sum(run.steps_done for run in runs),
        "steps_saved": data.steps_saved,
        "base": {"score": data.best_score("frozen")},
        "subjects": list_subject_rows(data),
        "sentences": [*text.list_notes(findings)],
        "recommended": [
            {
                "subject": one.subject.name,
                "is_settled": one.is_settled,
                "params": one.setting.params,
                "settings": text.name_settings(one),
                "commands": one.commands,
                "recipes": one.recipes,
            }
            for one in findings.recommended
        ],
        "evidence": {
            "num_examples": evidence.scores.num_examples,
            "num_groups": evidence.scores.num_groups,
            "base": evidence.scale.base,
            "full": evidence.scale.full,
            **{name: getattr(evidence, name) for name in ("gain", "margin", "confidence")},
        },
    }


def _build_answer(answer: Answer, data: SweepData) -> dict[str, Any]:
    return {
        "question": text.name_question(answer, data),
        "name": answer.name,
        "arm": answer.arm,
        "state": answer.state,
        "headline": text.describe_headline(answer, data),
        "unit": text.describe_unit(answer, data),
        "rows": [text.build_entry(row) | {"is_share": row.is_share, "seeds": row.num_seeds} for row in answer.rows],
        "next": asdict(answer.next) if answer.next else None,
    }


def build_tables(findings: Findings) -> dict[str, pandas.DataFrame]:
    """Returns the content of each CSV file: trials, their curves, and after a confirm stage its runs."""
    data, record = findings.data, findings.data.record
    metric = record.search_metric.name
    keys = tuple(dict.fromkeys([*data.swept_keys, RANK, ALPHA, LR]))
    trials = build_frame(data.trials, metric=metric, keys=keys).drop(columns="step", errors="ignore")
    trials = trials.assign(
        method=[row.method for row in record.arms for _ in data.list_trials(row.name)],
        share_of_full_gain=[data.find_search_share(trial.search_score) for trial in data.trials],
        is_better_than_untrained=[findings.learning.is_better(trial) for trial in data.trials],
    )
    curves = [(trial.arm, trial.number, *point) for trial in data.trials for point in trial.curve]
    tables = {"trials.csv": trials, "curves.csv": pandas.DataFrame(curves, columns=["arm", "trial", "step", metric])}
    found = [(answer.arm, row) for answer in findings.answers for row in answer.rows]
    ends = [dict(zip(("low", "high"), row.interval or (None, None), strict=True)) for _, row in found]
    entries = [{"arm": arm, **text.build_entry(row), **end} for (arm, row), end in zip(found, ends, strict=True)]
    tables["answers.csv"] = pandas.DataFrame(entries).drop(columns="interval", errors="ignore")
    if data.confirm_runs:
        tables["confirmed.csv"] = build_frame(data.confirm_runs, metric=record.verdict_metric.name)
    return tables


def write_tensorboard(findings: Findings, folder: Path) -> None:
    """Writes TensorBoard's files of a sweep, in place of an earlier report's.

    HParams has a row per trial, Scalars the best validation curve of each subject in one chart, and Text the answers.
    """
    data, lines = findings.data, []
    for question, headline, below in list_lines(findings):
        lines += [f"- **{question}** {headline}", *(f"    - {line}" for line in below)]
    lines += ["", f"Figures and tables are in the page `{data.folder.absolute().name}/report/index.html`."]
    as_text = create_summary_metadata(display_name="answers", description="")
    answer = Value(tag="answers", metadata=as_text, tensor=make_tensor_proto(["\n".join(lines)]))
    _write_events(folder / "arms", [(0, answer)])
    # each subject's best curve is a run of TensorBoard, so that it has its own colour
    search, test = data.record.search_metric.name, data.record.verdict_metric.name
    tag, last_step = f"{ARM_TAG}/{search}", max((trial.step for trial in data.trials), default=0)
    for one in data.subjects:
        curve = one.best.run.curve if one.best and one.best.run else ()
        if len(curve) == 1:  # the frozen base: one evaluation, drawn as a line across the chart
            curve = (*curve, (last_step, curve[0][1]))
        if curve:
            _write_events(folder / "arms" / one.name, [(step, Value(tag=tag, simple_value=v)) for step, v in curve])
        mean = data.evidence.mean(one.name)
        for trial in [trial for trial in one.trials if trial.record and trial.state != "running"]:
            scores = {f"best/{search}": trial.search_score}
            if mean and one.best and trial.number == one.best.trial:
                scores[f"test/{test}"] = mean.value
            _write_row(trial, scores, folder, sweep=data.folder.absolute().name)


def _write_row(trial: Trial, scores: Mapping[str, float | None], folder: Path, *, sweep: str) -> None:
    """Writes the row of a trial in TensorBoard's HParams."""
    name, settings = Path(trial.run).name, {"arm": trial.subject, "status": trial.state, **trial.params}
    # A number stays a number and everything else becomes text, so that a column keeps its type over runs. A None would
    # turn TensorBoard's whole column into text.
    columns = {
        key: float(value) if is_number(value) else str(redact(str(value)))
        for key, value in settings.items()
        if value is not None
    }
    metrics = {**scores, **{cost: getattr(trial.record, cost) for cost in COST_METRICS}}
    known = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
    values = hparams_pb(columns, trial_id=f"{name} of {sweep}").value
    row = [*values, *(Value(tag=key, simple_value=value) for key, value in known.items())]
    _write_events(folder / "trials" / name, [(0, value) for value in row])


def _write_events(folder: Path, values: Sequence[tuple[int, Any]]) -> None:
    """Writes one event file with values by step, in place of earlier ones."""
    old = list(folder.glob(f"events.*{EVENT_FILE_SUFFIX}"))
    writer = EventFileWriter(str(folder), filename_suffix=EVENT_FILE_SUFFIX)
    for step, value in values:
        writer.add_event(Event(wall_time=time.time(), step=step, summary=EventSummary(value=[value])))
    writer.close()
    # Old files are removed last, so that a killed process leaves at least one whole file.
    for path in old:
        path.unlink()
