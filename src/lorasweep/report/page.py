"""The report as one self-contained HTML page with tables and plotly's figures. It loads nothing from the network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from lorasweep import wording
from lorasweep.disk import open_inside
from lorasweep.record import ANSWERS_FILE, STATES, Trial
from lorasweep.report import text
from lorasweep.report.facts import Findings
from lorasweep.report.figures import Panel, build_link, choose_colours
from lorasweep.report.sweep_data import SweepData

COST_COLUMNS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("trained", "trainable parameters", "trainable_params", wording.format_count),
    ("steps", "optimizer steps done", "steps_done", wording.format_setting),
    ("memory", "peak memory", "peak_memory_bytes", wording.format_bytes),
    ("time", "time of the run", "wall_s", wording.format_seconds),
)
"""Columns of the table of runs: title, hover text, the field of the run's record, and how to format it."""
MAX_SHOWN_EXAMPLES = 5
"""Maximum number of test examples whose answers the page shows."""
RunCell = tuple[str, float | str | None]
"""The text of a cell of the table of runs, and the value by which its column is sorted; None sorts last."""


def render_page(findings: Findings, panels: Sequence[Panel]) -> str:
    """Returns the page as HTML."""
    data, metric = findings.data, wording.format_metric
    tested = dict.fromkeys(
        name for run in data.confirm_runs for name in (data.record.verdict_metric.name, *run.test_scores)
    )
    environment = Environment(
        loader=PackageLoader("lorasweep.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"metric": metric, "score": wording.format_score, "code": _mark_code, "link": build_link}
    return environment.get_template("index.html").render(
        figure_json=_figure_json,
        plotly_js=Markup(get_plotlyjs()),
        data=data,
        sweep=data.record,
        findings=findings,
        evidence=data.evidence,
        text=text,
        states=STATES,
        generated=list_generated_examples(data),
        colours=choose_colours(data),
        panels=panels,
        columns=[
            ("run", "arm and number of the trial in its Optuna study, or subject and seed of a confirm run"),
            ("state", "complete, running, or why it stopped"),
            (metric(data.record.search_metric.name), "best value on validation data"),
            *((f"{metric(name)}, test", "on test data") for name in tested),
            *((wording.short_key(key), key) for key in data.swept_keys),
            *((title, about) for title, about, _, _ in COST_COLUMNS),
        ],
        rows=[(run, _build_cells(run, data, tested)) for run in (*data.trials, *data.confirm_runs)],
    )


def _mark_code(sentence: str) -> Markup:
    """Returns text as HTML, with code between backticks. Lines break at spaces of code, never inside `--format`."""

    def mark(found: re.Match[str]) -> str:
        words = [f"<span>{word}</span>" for word in found[1].split(" ")]
        return f"<code>{' '.join(words) if len(words) > 1 else found[1]}</code>"

    return Markup(re.sub(r"`([^`]*)`", mark, str(escape(sentence))))


def _figure_json(panel: Panel) -> Markup:
    """Returns a panel's figures as JSON. Plotly escapes `<` in it, so that no name can end the script element."""
    return Markup(f"[{','.join(figure.to_json() for figure in panel.figures)}]")


def _build_cells(run: Trial, data: SweepData, tested: Iterable[str]) -> list[RunCell]:
    # the best value of a stopped trial is not that of all its steps
    state = f"stopped at step {run.step}" if run.state == "stopped" else run.state
    scores = [run.search_score, *(run.test_scores.get(name) for name in tested)]
    cells: list[RunCell] = [(state, state)]
    cells += [(wording.format_score(score), score) for score in scores]
    for key in data.swept_keys:
        text, number = wording.format_setting(run.params.get(key, "")), run.numeric_setting(key)
        cells.append((text, (text if number is None else number) if key in run.params else None))
    for _, _, name, form in COST_COLUMNS:
        value = getattr(run.record, name, None)
        cells.append((wording.UNKNOWN if value is None else form(value), value))
    return cells


class GeneratedExample(NamedTuple):
    """A test example with the text that each subject generated."""

    prompt: str
    reference: str
    texts: Mapping[str, tuple[str, str]]
    """Generated text and its score by subject, the base first. A score is empty if the function gave none."""


def list_generated_examples(data: SweepData) -> list[GeneratedExample]:
    """Returns test examples that the base and the first complete confirm run of each subject answered."""
    files = {"base": data.folder / ANSWERS_FILE.format("base")}  # exists if no arm is the base
    for one in sorted(data.subjects, key=lambda one: not one.row.is_base):
        for run in [run for run in one.confirm_runs if run.is_complete][:1]:
            files[one.name] = data.folder / run.run / ANSWERS_FILE.format("test")
    tables = {name: table for name, path in files.items() if (table := _read_answers(path, data.folder))}
    rows = [row for row in next(iter(tables.values()), {}) if all(row in table for table in tables.values())]
    examples = []
    for row in rows[:: max(1, len(rows) // MAX_SHOWN_EXAMPLES)][:MAX_SHOWN_EXAMPLES]:
        prompt, reference, *_ = next(iter(tables.values()))[row]
        texts = {name: (table[row][2], table[row][3]) for name, table in tables.items()}
        examples.append(GeneratedExample(prompt, reference, texts))
    return examples


def _read_answers(path: Path, folder: Path) -> dict[str, list[str]]:
    """Returns prompt, reference, answer and score by row; empty if the file is missing or damaged."""
    try:
        with open_inside(folder, path) as file:
            columns = ["row", "prompt", "reference", "answer", "score"]
            table = pandas.read_csv(file, usecols=columns, dtype=str, keep_default_na=False)
    except (OSError, ValueError):
        return {}
    return {row: list(map(str, others)) for row, *others in table[columns].itertuples(index=False)}
