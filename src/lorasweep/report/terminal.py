"""The report in the terminal (rich): the answers and the subjects of a sweep."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.report import text
from lorasweep.report.facts import Findings
from lorasweep.report.sweep_data import SweepData
from lorasweep.wording import format_metric


def render_terminal(findings: Findings, *, verbose: bool = False) -> RenderableType:
    """Returns the answers and the table of a sweep; `verbose` adds the other sentences of the report."""
    headline, remedy = text.describe_failure(findings)
    notes = text.list_notes(findings) if verbose else []
    sentences = [*([remedy] if remedy else []), *text.list_warnings(findings), *notes, *findings.data.problems]
    return Group(
        *([Text(headline, style="bold red")] if headline else []),
        *_render_answers(findings),
        _draw_subjects(findings.data),
        *(Text(f"• {sentence}") for sentence in sentences),
    )


def list_lines(findings: Findings) -> Iterator[tuple[str, str, list[str]]]:
    """Yields each question with its headline, and the lines below it: a row for each value, and what to type next."""
    for answer in findings.answers:
        data, unit = findings.data, text.describe_unit(answer, findings.data)
        headline, cells = text.describe_headline(answer, data), text.list_cells(answer, data)
        widths = [max(len(row[column]) for row in cells) for column in range(2)] if cells else []
        rows = [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {verdict}" for name, value, verdict in cells]
        if answer.next:
            rows.append(f"{text.describe_step(answer.next)}: {answer.next.command}".removesuffix(": None"))
        yield text.name_question(answer, data), f"{headline}{f' ({unit})' if unit else ''}", rows


def _render_answers(findings: Findings) -> Iterator[Text]:
    for answer, (question, headline, lines) in zip(findings.answers, list_lines(findings), strict=True):
        style = "" if answer.state == "settled" else "yellow"
        yield Text.assemble((question, "bold"), f" {headline}", style=style)
        # one line, so that a terminal copies a long command without breaks
        yield from (Text(f"  {line}", no_wrap=True, overflow="ignore") for line in lines)


def _draw_subjects(data: SweepData) -> Table:
    """Returns a table with a row for each subject. It lacks columns of the page, to fit into 80 characters."""
    columns = text.list_columns(data)
    # confirmed shares are in the answers
    left_out = ("adapter", "memory", "time", *(["of full's gain"] if data.evidence.means else []))
    names = [name for name in columns if name not in left_out]
    if data.other_means:  # 80 characters have no room for this column and the search score
        names.remove("search score")
    title = f"{data.record.name}: {format_metric(data.shown_metric.name)}, {data.shown_metric.better_scores} is better"
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold", no_wrap=True)
    table.add_column("best settings", overflow="fold")
    # an interval without a blank is one word, which is not broken
    cells = {name: [cell.replace(", ", ",") for cell in columns[name]] for name in names}
    for name in names:
        width = max((len(word) for cell in cells[name] for word in cell.split()), default=0)
        table.add_column(name, justify="right", overflow="fold", min_width=width)
    for row, one in enumerate(data.subjects):
        table.add_row(Text(one.name), Text(text.describe_setting(one)), *(Text(cells[name][row]) for name in names))
    return table
