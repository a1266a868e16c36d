"""The report in the terminal (rich): the answers and the subjects of a sweep, or the spread of several sweeps."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.config.run import LR
from lorasweep.errors import ConfigError
from lorasweep.report.answers import AnswerLine, describe_answer
from lorasweep.report.recommend import format_arm_score
from lorasweep.report.summary import Summary, summarize
from lorasweep.report.sweep_data import SubjectData, SweepData
from lorasweep.wording import (
    count_percent_decimals,
    format_count,
    format_metric,
    format_score,
    format_setting,
    format_settings,
    format_share_estimate,
    join_words,
)


def render_terminal(folder: Path, *, verbose: bool = False) -> RenderableType:
    """Returns the answers and the table of a sweep; `verbose` adds the other sentences of the report.

    Raises:
        RecordError: The folder is not a sweep, or its record is damaged.
    """
    summary = summarize(folder)
    learning = summary.learning
    sentences = [
        *([learning.remedy] if learning.remedy else []),
        *summary.warnings,
        *([*list_details(summary.data), *summary.sentences] if verbose else ()),
        *summary.data.problems,
    ]
    return Group(
        *([Text(learning.headline, style="bold red")] if learning.headline else []),
        *render_answers(summary.answers),
        _draw_arms(summary),
        *(Text(f"• {sentence}") for sentence in sentences),
    )


def render_spread(folders: Sequence[Path]) -> RenderableType:
    """Returns the score and the learning rate of each subject in several sweeps, and their spread.

    Sweeps that differ only in `sweep.seed` show how much a result depends on chance. Nothing is tested.

    Raises:
        ConfigError: The sweeps do not have the same metric.
        RecordError: A folder is not a sweep, or its record is damaged.
    """
    sweeps = [summarize(folder).data for folder in folders]
    if len(metrics := {sweep.record.verdict_metric.name for sweep in sweeps}) > 1:
        raise ConfigError(f"sweeps must have the same metric to be compared, but have {join_words(sorted(metrics))}.")
    is_share = all(sweep.evidence.gain for sweep in sweeps)
    shown = "share of full's gain" if is_share else format_metric(metrics.pop())
    table = Table(
        title=f"{shown}, and the learning rate", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("arm", overflow="fold")
    for name in (*(str(folder) for folder in folders), "mean ± sd"):
        table.add_column(Text(name), justify="right", overflow="fold")
    for name in dict.fromkeys(arm.name for sweep in sweeps for arm in sweep.subjects):
        found, cells = [], []
        for sweep in sweeps:
            arm, mean, share = sweep.find_subject(name), sweep.evidence.mean(name), sweep.evidence.shares.get(name)
            value = (share[0] if share else None) if is_share else mean.value if mean else None
            rate = arm.best.params.get(LR) if arm and arm.best else None
            cells.append("–" if value is None else f"{value:.3f}" + (f"\n{format_setting(rate)}" if rate else ""))
            found += [] if value is None else [value]
        spread = f"{statistics.fmean(found):.3f} ± {statistics.stdev(found):.3f}" if len(found) > 1 else "–"
        table.add_row(name, *cells, spread)
    note = "The spread comes from search, seeds and training together. Differences between sweeps are not tested."
    return Group(table, Text(f"• {note}"))


def render_answers(lines: Iterable[AnswerLine]) -> list[Text]:
    """Returns a line for each question with its answer, yellow if it is not settled."""
    return [
        Text.assemble((line.question, "bold"), f" {line.text}", style="" if line.is_settled else "yellow")
        for line in lines
    ]


def list_details(data: SweepData) -> list[str]:
    """Returns a sentence for each answer that is not in the three lines: on other methods, and on pairs."""
    lora = {arm.name for arm in data.subjects if arm.row.method == "lora"}
    return [
        f"{describe_answer(answer, data)}."
        for answer in data.evidence.answers
        if answer.name == "pair" or answer.subject not in lora
    ]


def _draw_arms(summary: Summary) -> Table:
    """Returns a row for each subject; the page has more columns, which a terminal of 80 characters has no room for."""
    data = summary.data
    shares = [data.subject_share_of_full_gain(arm) for arm in data.subjects]
    share_decimals = count_percent_decimals(interval for _, interval in shares)
    columns = {
        "arm": [arm.name for arm in data.subjects],
        "best settings": [describe_setting(arm) for arm in data.subjects],
        "test score": [format_arm_score(arm, data) for arm in data.subjects],
        "search score": list_search_scores(summary),
        "of full's gain": [format_share_estimate(*share, decimals=share_decimals) for share in shares],
        "trained": [format_count(arm.cost("trainable_params")) for arm in data.subjects],
    }
    if not data.evidence.means:
        del columns["test score"]
    if data.other_means and data.other_metric:  # there is no room for both
        del columns["search score"]
        others = [format_arm_score(arm, data, means=data.other_means) for arm in data.subjects]
        columns[format_metric(data.other_metric.name)] = others
    title = Text(f"{data.record.name}: {format_metric(data.shown_metric.name)}", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        is_text = name in ("arm", "best settings")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=name == "arm")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def describe_setting(arm: SubjectData) -> str:
    """Returns the settings of a subject, without the value that its name has, and whether they are predicted."""
    if arm.best is None:
        return "no complete trial"
    settings = format_settings({key: value for key, value in arm.best.params.items() if key != arm.subject.key})
    return f"{settings} (predicted)" if arm.best.is_predicted else settings


def list_search_scores(summary: Summary) -> list[str]:
    """Returns the score of each subject on validation data; a mark says if it learned nothing."""
    data, learning = summary.data, summary.learning
    scores = [arm.best.value if arm.best else None for arm in data.subjects]
    shown = []
    for arm, score in zip(data.subjects, scores, strict=True):
        is_worse = arm.best and not arm.row.is_base and learning.is_better(arm.best) is False
        mark = f" (not better than {learning.answer})" if is_worse else ""
        shown.append(f"{format_score(score, beside=scores)}{mark}")
    return shown
