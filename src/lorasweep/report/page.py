"""The report as one self-contained HTML page with tables and plotly's figures. It loads nothing from the network."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from lorasweep import wording
from lorasweep.record import STATES, Trial
from lorasweep.report.answers import describe_answer, describe_change
from lorasweep.report.generated import list_answered_examples
from lorasweep.report.panel import Panel, build_link, choose_colours, select_trials
from lorasweep.report.recommend import format_arm_score
from lorasweep.report.summary import Summary
from lorasweep.report.terminal import describe_setting, list_search_scores

MAX_REASONS = 100
"""The section on unfinished trials lists at most this many trials of each state."""
FILTERS = {
    "count": wording.format_count,
    "size": wording.format_bytes,
    "share": wording.format_share_estimate,
    "seconds": wording.format_seconds,
    "score": wording.format_score,
    "metric": wording.format_metric,
    "settings": wording.format_settings,
}
"""The template's names of functions that format numbers and settings."""

COSTS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("trained", "trainable parameters", "trainable_params", wording.format_count),
    ("steps", "optimizer steps done", "steps_done", wording.format_setting),
    ("memory", "peak memory", "peak_memory_bytes", wording.format_bytes),
    ("time", "time of the run", "wall_s", wording.format_seconds),
)
"""Columns of the table of trials: title, hover text, the field of the run's record, and how to format it."""
Cell = tuple[str, float | str | None]
"""The text of a cell of the table of trials, and the value by which its column is sorted; None sorts last."""


def render_page(summary: Summary, panels: Sequence[Panel]) -> str:
    """Returns the page as HTML."""
    data = summary.data
    return (
        load_templates()
        .get_template("index.html")
        .render(
            data=data,
            sweep=data.record,
            summary=summary,
            evidence=data.evidence,
            search_scores=list_search_scores(summary),
            format_arm_score=format_arm_score,
            share_decimals=wording.count_percent_decimals(
                data.subject_share_of_full_gain(arm)[1] for arm in data.subjects
            ),
            describe_setting=describe_setting,
            states=STATES,
            verdicts=[(answer, describe_answer(answer, data)) for answer in data.evidence.answers],
            generated=list_answered_examples(data),
            retained=[(change, describe_change(change, data)) for change in data.retained],
            unlearned=summary.learning.unlearned,
            colours=choose_colours(data),
            panels=panels,
            columns=[
                ("trial", "arm and number of the trial in its Optuna study"),
                ("state", "complete, running, or why it stopped; `not better` than an answer that needs no training"),
                (wording.format_metric(data.record.metric), "best value on validation data"),
                *((wording.short_key(key), key) for key in data.swept_keys),
                *((title, about) for title, about, _, _ in COSTS),
            ],
            rows=[(trial, _build_cells(trial, summary)) for trial in select_trials(data).trials],
            unfinished={
                state: [run for run in (*data.trials, *data.confirm_runs) if run.state == state]
                for state in STATES
                if state != "complete"
            },
            max_reasons=MAX_REASONS,
        )
    )


@functools.cache  # compiling the templates takes longer than rendering them
def load_templates() -> Environment:
    """Returns the templates with their filters."""
    environment = Environment(
        loader=PackageLoader("lorasweep.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(FILTERS, code=mark_code, link=build_link)
    environment.globals.update(figure_json=figure_json, plotly_js=Markup(get_plotlyjs()))
    return environment


def mark_code(text: str) -> Markup:
    """Returns text as HTML, with code between backticks. Lines break at spaces of code, never inside `--format`."""

    def mark(found: re.Match[str]) -> str:
        words = [f"<span>{word}</span>" for word in found[1].split(" ")]
        return f"<code>{' '.join(words) if len(words) > 1 else found[1]}</code>"

    return Markup(re.sub(r"`([^`]*)`", mark, str(escape(text))))


def figure_json(panel: Panel) -> Markup:
    """Returns a panel's figures as JSON. Plotly escapes `<` in it, so that no name can end the script element."""
    return Markup(f"[{','.join(figure.to_json() for figure in panel.figures)}]")


def _build_cells(trial: Trial, summary: Summary) -> list[Cell]:
    data = summary.data
    is_better = summary.learning.is_better(trial)
    state = f"{trial.state}, not better" if is_better is False and trial.trains else trial.state
    # the best value of a stopped trial is not that of all its steps
    so_far = f" at step {trial.step}" if trial.state == "stopped" and trial.value is not None else ""
    cells: list[Cell] = [(state, state), (f"{wording.format_score(trial.value)}{so_far}", trial.value)]
    for key in data.swept_keys:
        text, number = wording.format_setting(trial.params.get(key, "")), trial.numeric_setting(key)
        cells.append((text, (text if number is None else number) if key in trial.params else None))
    for _, _, name, form in COSTS:
        value = getattr(trial.record, name, None)
        cells.append((wording.UNKNOWN if value is None else form(value), value))
    return cells
