"""The report as one self-contained HTML page: tables and plotly's figures, nothing from the network.

Names in it are input that nobody checked: jinja2 escapes them in the page, `figures.panel.escape` in the figures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from lorasweep import wording
from lorasweep.report.figures import Panel
from lorasweep.report.figures.panel import colours_of, link_of, link_to
from lorasweep.report.summary import Summary
from lorasweep.report.tables import Arm, SweepData, Trial
from lorasweep.report.terminal import format_trial_counts
from lorasweep.report.thinning import MAX_TABLE_ROWS, share_out
from lorasweep.report.time_use import describe_time_use

UNFINISHED = ("failed", "infeasible", "pruned", "paused", "running")
MAX_REASONS = 100
"""The section on unfinished trials lists at most this many trials of each state."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the table of trials."""

    text: str
    key: float | str | None = None
    """What the column is sorted by; None sorts last."""


def render_page(data: SweepData, summary: Summary, panels: Sequence[Panel]) -> str:
    """Returns the page as HTML.

    Args:
        data: The sweep.
        summary: What it found.
        panels: The figures, in the order of the page.
    """
    shown = find_rows(data)
    return load_template("index.html").render(
        sweep=data.record,
        summary=summary,
        prefix="..",
        colours=colours_of(data),
        panels=panels,
        pairs=data.evidence.pairs,
        columns=_columns(data),
        rows=[(trial, link_to(trial), _cells(trial, data)) for trial in shown],
        num_trials=len(data.trials),
        reruns=[(rerun, link_of(rerun.run)) for rerun in data.reruns],
        unfinished={state: _unfinished(data, state) for state in UNFINISHED},
        max_reasons=MAX_REASONS,
        problems=data.problems,
        use=summary.time_use,
    )


def find_rows(data: SweepData) -> list[Trial]:
    """Returns the trials of the table by arm and number: all, or the best of each arm if the sweep is large."""
    shares = share_out([len(arm.trials) for arm in data.arms], MAX_TABLE_ROWS)
    return [trial for arm, share in zip(data.arms, shares, strict=True) for trial in _best_of(arm, share, data)]


def _best_of(arm: Arm, count: int, data: SweepData) -> list[Trial]:
    """Returns an arm's best trials by number. Incomplete trials are taken last."""

    def rank(trial: Trial) -> tuple[bool, float]:
        return not trial.is_complete, math.inf if trial.value is None else data.sign * trial.value

    return sorted(sorted(arm.trials, key=rank)[:count], key=lambda trial: trial.number)


def load_template(name: str) -> Template:
    """Returns a template that knows how numbers are written and holds plotly's script."""
    environment = Environment(
        loader=PackageLoader("lorasweep.report"),
        autoescape=True,
        finalize=lambda value: wording.visible(value, keep="\n\t") if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(code=mark_code, **_formats())
    environment.globals.update(
        figure_json=figure_json,
        plotly_js=Markup(get_plotlyjs()),  # the library's own file
        settings=wording.format_settings,
        counts=format_trial_counts,
        describe_time_use=describe_time_use,
    )
    return environment.get_template(name)


def mark_code(text: str) -> Markup:
    """Returns text as HTML in which what stood between backticks is code."""
    return Markup(
        re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(wording.visible(text))))
    )  # escaped one line above


def figure_json(panel: Panel) -> Markup:
    """Returns a panel's figures as JSON that can stand inside a script element whatever names it holds."""
    text = f"[{','.join(figure.to_json() for figure in panel.figures)}]"
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # no character that ends a script element is left


def _formats() -> dict[str, Any]:
    return {
        "count": wording.format_count,
        "size": wording.format_bytes,
        "share": wording.format_share,
        "shares": wording.format_share_estimate,
        "estimate": wording.format_estimate,
        "difference": wording.format_difference,
        "p_value": wording.format_p_value,
        "seconds": wording.format_seconds,
        "score": wording.format_score,
        "metric": wording.format_metric,
    }


def _unfinished(data: SweepData, state: str) -> list[tuple[str, str, str, str]]:
    """Returns name, link, settings and reason of each trial and rerun in a state."""
    trials = [
        (f"{trial.arm} {trial.number}", link_to(trial), wording.format_settings(trial.params), trial.reason)
        for trial in data.trials
        if trial.state == state
    ]
    reruns = [
        (f"{rerun.arm} {rerun.trial}, seed {rerun.seed}", link_of(rerun.run), "rerun", rerun.reason)
        for rerun in data.reruns
        if rerun.state == state
    ]
    rows = (*trials, *reruns)
    return [(name, link, about, (why or "no reason recorded").strip()) for name, link, about, why in rows]


def _columns(data: SweepData) -> list[tuple[str, str]]:
    """Titles of the table of trials with what they say when pointed at."""
    swept = [(wording.short_key(key), key) for key in data.swept_keys]
    return [
        ("trial", "arm and number of the trial in its Optuna study"),
        ("state", "complete, running, or why it stopped"),
        (wording.format_metric(data.record.metric), "best value on validation data"),
        *swept,
        ("trained", "trainable parameters"),
        ("steps", "optimizer steps done"),
        ("memory", "peak memory"),
        ("time", "seconds of the run"),
    ]


def _cells(trial: Trial, data: SweepData) -> list[Cell]:
    record = trial.record
    measured = {
        "trainable_params": wording.format_count,
        "steps_done": wording.format_setting,
        "peak_memory_bytes": wording.format_bytes,
        "wall_s": wording.format_seconds,
    }
    costs = [(getattr(record, name, None), form) for name, form in measured.items()]
    return [
        Cell(text=trial.state, key=trial.state),
        Cell(text=wording.format_score(trial.value), key=trial.value),
        *(_setting_cell(trial, key) for key in data.swept_keys),
        *(Cell(text=wording.UNKNOWN if value is None else form(value), key=value) for value, form in costs),
    ]


def _setting_cell(trial: Trial, key: str) -> Cell:
    if key not in trial.params:
        return Cell(text="")
    number = trial.number_at(key)
    text = wording.format_setting(trial.params[key])
    return Cell(text=text, key=text if number is None else number)
