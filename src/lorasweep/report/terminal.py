"""The report in the terminal (rich): the answers and the subjects of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.report.answers import AnswerLine, describe_answer
from lorasweep.report.evidence.estimates import Estimate
from lorasweep.report.findings import Findings
from lorasweep.report.sweep_data import SubjectData, SweepData
from lorasweep.wording import (
    UNKNOWN,
    count_decimals,
    count_percent_decimals,
    format_bytes,
    format_count,
    format_estimate,
    format_metric,
    format_score,
    format_seconds,
    format_settings,
    format_share_estimate,
)


def render_terminal(findings: Findings, *, verbose: bool = False) -> RenderableType:
    """Returns the answers and the table of a sweep; `verbose` adds the other sentences of the report."""
    learning = findings.learning
    sentences = [
        *([learning.remedy] if learning.remedy else []),
        *findings.warnings,
        *([*list_details(findings.data), *findings.notes] if verbose else ()),
        *findings.data.problems,
    ]
    return Group(
        *([Text(learning.headline, style="bold red")] if learning.headline else []),
        *render_answers(findings.answers),
        _draw_subjects(findings.data),
        *(Text(f"• {sentence}") for sentence in sentences),
    )


def render_answers(lines: Iterable[AnswerLine]) -> list[Text]:
    """Returns a line for each question with its answer, yellow if it is not settled, and then what to type next."""
    texts = []
    for line in lines:
        texts.append(
            Text.assemble((line.question, "bold"), f" {line.text}", style="" if line.state == "settled" else "yellow")
        )
        # one line, so that a terminal copies a long command without breaks
        texts += [Text(f"  {line.next}", no_wrap=True, overflow="ignore")] if line.next else []
    return texts


def list_details(data: SweepData) -> list[str]:
    """Returns a sentence for each answer that the three lines do not have: on pairs, and on methods beside LoRA."""
    lora = {one.name for one in data.subjects if one.row.method == "lora"}
    return [
        f"{describe_answer(answer, data)}."
        for answer in data.evidence.answers
        if answer.name == "pair" or answer.subject not in lora
    ]


def list_columns(data: SweepData) -> dict[str, list[str]]:
    """Returns the columns of the table of subjects by title: scores and costs, with one cell for each subject."""
    scores = [one.search_score for one in data.subjects]
    shares = [data.subject_share_of_full_gain(one) for one in data.subjects]
    decimals = count_percent_decimals(interval for _, interval in shares)
    columns, tested = {}, {"test score": data.evidence.means}
    if data.other_metric:
        tested[format_metric(data.other_metric.name)] = data.other_means
    for title, means in tested.items():
        if means:
            shown = format_means(means)
            columns[title] = [shown.get(one.name, UNKNOWN) for one in data.subjects]
    return columns | {
        "search score": [format_score(score, beside=scores) for score in scores],
        "of full's gain": [format_share_estimate(*share, decimals=decimals) for share in shares],
        "trained": [format_count(one.cost("trainable_params")) for one in data.subjects],
        "adapter": [format_bytes(one.cost("adapter_bytes")) for one in data.subjects],
        "memory": [format_bytes(one.cost("peak_memory_bytes")) for one in data.subjects],
        "time": [format_seconds(one.cost("wall_s")) for one in data.subjects],
    }


def format_means(means: Mapping[str, Estimate]) -> dict[str, str]:
    """Returns the mean scores of subjects with their intervals, all with the same number of decimals."""
    intervals = {name: mean.find_interval() for name, mean in means.items()}
    decimals = count_decimals(intervals.values())
    return {name: format_estimate(mean.value, intervals[name], decimals=decimals) for name, mean in means.items()}


def _draw_subjects(data: SweepData) -> Table:
    """Returns a table with a row for each subject. It lacks columns of the page, to fit into 80 characters."""
    columns = list_columns(data)
    names = [name for name in columns if name not in ("adapter", "memory", "time")]
    if data.other_means:  # 80 characters have no room for this column and the search score
        names.remove("search score")
    title = f"{data.record.name}: {format_metric(data.shown_metric.name)}, {data.shown_metric.better_scores} is better"
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold", no_wrap=True)
    table.add_column("best settings", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row, one in enumerate(data.subjects):
        table.add_row(Text(one.name), Text(describe_setting(one)), *(Text(columns[name][row]) for name in names))
    return table


def describe_setting(one: SubjectData) -> str:
    """Returns a subject's best settings as text, without the value in its name. Says if they are predicted."""
    if one.best is None:
        return "no complete trial"
    settings = format_settings({key: value for key, value in one.best.params.items() if key != one.subject.key})
    return f"{settings} (predicted)" if one.best.is_predicted else settings
