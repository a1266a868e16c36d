"""Compares sweeps, such as those that differ in the amount of training data alone: table, sentences and figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.config.build import flatten
from lorasweep.config.run import STEPS_KEY
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError
from lorasweep.record import is_number
from lorasweep.report.evidence.estimates import Interval
from lorasweep.report.evidence.growth import Slope, estimate_slopes
from lorasweep.report.page import render_template
from lorasweep.report.panel import METHOD_COLOURS, Panel, add_point, build_figure, choose_colours, escape
from lorasweep.report.sweep_data import SweepData, load_sweep_data
from lorasweep.wording import (
    UNKNOWN,
    count_decimals,
    count_percent_decimals,
    format_estimate,
    format_metric,
    format_setting,
    format_share_estimate,
    join_words,
)

AMOUNT_KEYS = ("data.max_train_examples", "data.max_train_documents")
"""Settings of the amount of training data."""
NOT_COMPARED = ("sweep.output.", "sweep.minutes.", "worker.", "logger.", "callbacks.")
"""Settings that decide no result, with those below them."""
MAX_EPOCHS_RATIO = 1.1
"""Up to this ratio, sweeps have the same number of epochs."""
SHARE = "share of full's gain"
"""The compared quantity, unless a sweep does not know full fine-tuning's gain."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The result of a subject in one sweep."""

    value: float | None
    """The share of full fine-tuning's gain, or the score if a sweep has no such gain; None if it is not known."""
    interval: Interval | None
    verdict: str
    """Against full fine-tuning; empty if the sweep does not ask."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The results of several sweeps side by side."""

    sweeps: Mapping[str, Path]
    """The folder of each sweep by its label: the value of the one setting that differs, else the folder."""
    differences: Mapping[str, Sequence[Any]]
    """The value in each sweep of each setting that differs."""
    examples: Sequence[float]
    """The number of training examples in each sweep; 0 if it is not known."""
    cells: Mapping[str, Sequence[Cell | None]]
    """By subject; None if a sweep lacks it."""
    enough: Mapping[str, Sequence[str]]
    """By arm: the smallest value that is enough, in words."""
    slopes: Mapping[str, Slope]
    """By subject: the trend with the amount of training data, if nothing else differs."""
    quantity: str
    """The compared quantity: `SHARE`, or the name of the metric."""
    sentences: Sequence[str] = ()


def compare_sweeps(folders: Sequence[Path]) -> tuple[Comparison, Panel]:
    """Reads sweeps and returns their comparison, with its figure.

    Raises:
        ConfigError: A sweep is given twice or is not complete, or the sweeps have different metrics.
        RecordError: A folder is not a sweep, or its record is damaged.
    """
    found = [load_sweep_data(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"each sweep must be given once, but got {', '.join(map(str, folders))}.")
    for data in found:
        if data.record.status != "complete":
            raise ConfigError(f"{str(data.folder)!r} must be complete, but is not. Type `{data.completing_command}`.")
        if _name_metric(data) != _name_metric(found[0]):
            raise ConfigError(
                f"compared sweeps must have one metric, but {str(data.folder)!r} has {_name_metric(data)}, and "
                f"{str(folders[0])!r} has {_name_metric(found[0])}."
            )
    differences = _find_differences(found)
    key, values = next(iter(differences.items()), ("", []))
    is_growth = len(differences) == 1 and key in AMOUNT_KEYS
    is_growth = is_growth and len({data.num_train for data in found} - {0}) == len(found)
    order = [data.num_train for data in found] if is_growth else values
    if len(differences) == 1 and all(map(is_number, order)):
        places = sorted(range(len(found)), key=order.__getitem__)
        found, values = [found[place] for place in places], [values[place] for place in places]
    names = [format_setting(value).rsplit("/", 1)[-1] for value in values]
    labels = names if len(differences) == 1 and len({*names}) == len(found) else [str(data.folder) for data in found]
    subjects = dict.fromkeys(one.name for data in found for one in data.subjects if not one.row.is_base)
    has_shares = all(data.evidence.gain or (data.full_gain and not data.evidence.means) for data in found)
    examples = [data.num_train for data in found]
    arms, evidence = [row.name for row in found[0].record.arms if row.key], [data.evidence for data in found]
    comparison = Comparison(
        sweeps={label: data.folder for label, data in zip(labels, found, strict=True)},
        differences={key: values} if len(differences) == 1 else differences,
        examples=examples,
        cells={name: [_read_cell(data, name, is_share=has_shares) for data in found] for name in subjects},
        enough={arm: [_describe_enough(data, arm) for data in found] for arm in arms},
        slopes=estimate_slopes(evidence, examples, sign=found[0].shown_metric.sign) if is_growth else {},
        quantity=SHARE if has_shares else _name_metric(found[0]),
    )
    comparison = replace(comparison, sentences=[*_describe(comparison, found)])
    return comparison, draw_comparison(comparison, choose_colours(found[0]))


def _name_metric(data: SweepData) -> str:
    return f"{format_metric(data.shown_metric.name)} on {'test' if data.evidence.means else 'validation'} data"


def _find_differences(sweeps: Sequence[SweepData]) -> dict[str, list[Any]]:
    """Returns the value in each sweep of each setting that differs, by the keys that their users named.

    Steps are left out if another setting differs and `sweep.epochs`, or the number of epochs, is the same: they follow
    from the amount of data.
    """
    prefixes = {"file.settings.": "", "file.arms.": "arms.", "overrides.": ""}  # the command line wins
    named: list[dict[str, Any]] = []
    for data in sweeps:
        items = flatten(data.record.definition).items()
        found = [(prefix, key, value) for prefix in prefixes for key, value in items if key.startswith(prefix)]
        named.append({prefixes[prefix] + key.removeprefix(prefix): value for prefix, key, value in found})
    defaults = [flatten(next((run.config for run in data.run_records), {})) for data in sweeps]
    differences: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for settings in named for key in settings):
        values = [settings.get(key, of.get(key)) for settings, of in zip(named, defaults, strict=True)]
        if any(value != values[0] for value in values) and not f"{key}.".startswith(NOT_COMPARED):
            differences[key] = values
    epochs = [settings.get("sweep.epochs") for settings in named]
    if len(differences) > 1 and (_have_equal_epochs(sweeps) or (epochs[0] and len({*epochs}) == 1)):
        differences.pop(STEPS_KEY, None)
    return differences


def _have_equal_epochs(sweeps: Sequence[SweepData]) -> bool:
    epochs = [data.epochs for data in sweeps]
    return 0 < max(epochs) <= MAX_EPOCHS_RATIO * min(epochs)


def _read_cell(data: SweepData, name: str, *, is_share: bool) -> Cell | None:
    if (one := data.find_subject(name)) is None:
        return None
    mean = data.evidence.mean(name)
    value, interval = data.find_score(one), mean.find_interval() if mean else None
    if is_share:
        value, interval = data.subject_share_of_full_gain(one)
    verdicts = {answer.subject: answer.verdict for answer in data.evidence.list_answers("as_good_as_full")}
    return Cell(value=value, interval=interval, verdict=verdicts.get(name, ""))


def _describe_enough(data: SweepData, arm: str) -> str:
    """Returns the smallest value of an arm that is enough: `4`, `at most 4`, `only 64`, or `open`."""
    outcome = data.evidence.find_outcome("smallest", arm)
    chosen = outcome.good.subject if outcome.good else outcome.largest if outcome.state == "settled" else None
    if (found := data.find_subject(chosen)) is None:
        return "open" if outcome.answers else UNKNOWN
    about = "only " if outcome.good is None else "" if outcome.state == "settled" else "at most "
    return about + format_setting(found.subject.value)


def _describe(comparison: Comparison, sweeps: Sequence[SweepData]) -> Iterator[str]:
    keys, labels = [f"`{key}`" for key in comparison.differences], [*comparison.sweeps]
    if len(keys) > 1:
        yield f"The sweeps differ in {join_words(keys)}, so no trend is shown."
    else:
        yield f"The sweeps differ in {keys[0]} alone." if keys else "The sweeps have the same settings."
    for arm, values in comparison.enough.items() if len(keys) == 1 else ():
        found = [f"{value} at {label}" for value, label in zip(values, labels, strict=True)]
        yield f"The smallest value of `{arm}` that is enough: {join_words(found)}."
    if comparison.slopes and not _have_equal_epochs(sweeps):
        epochs = join_words([f"{data.epochs:.2g}" for data in sweeps])
        yield f"The runs train {epochs} epochs, so the trend is that of data and epochs. Set `sweep.epochs`."
    if len(keys) == 1 and {*comparison.differences} <= {*AMOUNT_KEYS} and not comparison.slopes:
        yield "No trend is known: it needs a shown gain of full fine-tuning, and the same seeds and test examples."
    changes = [
        f"`{name}` {format_share_estimate(slope.value, slope.interval)}{'' if slope.is_settled else ' (open)'}"
        for name, slope in comparison.slopes.items()
    ]
    if changes:
        yield f"Change of the share of full's gain with twice the data: {join_words(changes)}."
    for subject, cells in comparison.cells.items() if {*comparison.differences} <= {"sweep.seed"} else ():
        known = [cell.value for cell in cells if cell and cell.value is not None]
        if len(known) == len(labels) and (spread := statistics.stdev(known)):
            shown = f"{100 * spread:.2g} points of full's gain" if comparison.quantity == SHARE else f"{spread:.2g}"
            yield f"Between the sweeps, `{subject}` has a standard deviation of {shown}."


def list_rows(comparison: Comparison) -> list[list[str]]:
    """Returns the rows of the table: the name of a subject, then a cell for each sweep."""
    intervals = [cell.interval for cells in comparison.cells.values() for cell in cells if cell]
    decimals = (count_percent_decimals if comparison.quantity == SHARE else count_decimals)(intervals)
    form = partial(format_share_estimate if comparison.quantity == SHARE else format_estimate, decimals=decimals)
    rows = [
        [name, *(f"{form(cell.value, cell.interval)} {cell.verdict}".rstrip() if cell else UNKNOWN for cell in cells)]
        for name, cells in comparison.cells.items()
    ]
    return [*rows, *([f"{arm}: enough", *values] for arm, values in comparison.enough.items())]


def render_comparison(comparison: Comparison) -> RenderableType:
    """Returns the table and the sentences for a terminal."""
    title = Text(comparison.quantity, style="bold")
    table = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for label in comparison.sweeps:
        table.add_column(Text(label), overflow="fold")
    for row in list_rows(comparison):
        table.add_row(*map(Text, row))
    return Group(table, *(Text(f"• {sentence}") for sentence in comparison.sentences))


def draw_comparison(comparison: Comparison, colours: Mapping[str, str]) -> Panel:
    """Returns the figure: a line for each subject over the sweeps, by the number of examples if only that differs."""
    by_data = bool(comparison.slopes)
    places = [math.log2(n) if by_data else float(place) for place, n in enumerate(comparison.examples)]
    figure = build_figure("training examples (log scale)" if by_data else " ", comparison.quantity)
    ticks = [
        f"{n:,}" if by_data else escape(label) for label, n in zip(comparison.sweeps, comparison.examples, strict=True)
    ]
    figure.update_xaxes(tickvals=places, ticktext=ticks, showgrid=False)
    if comparison.quantity == SHARE:
        figure.update_yaxes(tickformat=".0%")
    for number, (subject, cells) in enumerate(comparison.cells.items()):
        shift = 0.012 * (max(places) - min(places)) * (number - len(comparison.cells) / 2)  # keeps intervals apart
        found = [(place + shift, cell) for place, cell in zip(places, cells, strict=True) if cell]
        known = [(x, cell.value, cell) for x, cell in found if cell.value is not None]
        colour = colours.get(subject, METHOD_COLOURS["frozen"])
        line = {"mode": "lines", "line": {"color": colour, "width": 1.2}, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=[x for x, *_ in known], y=[y for _, y, _ in known], legendgroup=escape(subject), **line)
        for x, y, cell in known:
            look = {"interval": cell.interval, "showlegend": x == known[0][0]}
            add_point(figure, x, y, colour, subject, text=escape(f"{subject}: {y:.3g} {cell.verdict}"), **look)
    text = "Dots are means on test data. Bars are the intervals of each sweep's own answers."
    return Panel(key="comparison", title="Side by side", text=text, figures=(figure,))


def write_comparison(comparison: Comparison, panel: Panel, folder: Path) -> Path:
    """Writes the page `comparison.html` into the folder above the sweeps. Returns its path."""
    values = {"title": folder.absolute().name, "rows": list_rows(comparison), "panel": panel}
    write_atomically(folder / "comparison.html", render_template("comparison.html", comparison=comparison, **values))
    return folder / "comparison.html"
