"""Compares sweeps, such as those that differ in the amount of training data alone, in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorasweep.config.build import flatten
from lorasweep.config.run import STEPS_KEY
from lorasweep.errors import ConfigError
from lorasweep.record import is_number
from lorasweep.report.evidence.estimates import Interval
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

NOT_COMPARED = ("sweep.output.", "worker.", "logger.", "callbacks.")
"""Settings that decide no result, with those below them."""
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
    quantity: str
    """The compared quantity: `SHARE`, or the name of the metric."""


def compare_sweeps(folders: Sequence[str | Path]) -> Comparison:
    """Reads sweeps and returns their comparison.

    >>> lorasweep.compare_sweeps(["outputs/tiny"]).quantity
    'bits per byte on validation data'

    Raises:
        ConfigError: A sweep is given twice or is not complete, or the sweeps have different metrics.
        RecordError: A folder is not a sweep, or its record is damaged.
    """
    found = [load_sweep_data(Path(folder)) for folder in folders]
    if len({data.folder.resolve() for data in found}) < len(folders):
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
    values = next(iter(differences.values()), [])
    if len(differences) == 1 and all(map(is_number, values)):
        places = sorted(range(len(found)), key=values.__getitem__)
        found, values = [found[place] for place in places], [values[place] for place in places]
        differences = dict.fromkeys(differences, values)
    names = [format_setting(value).rsplit("/", 1)[-1] for value in values]
    labels = names if len(differences) == 1 and len({*names}) == len(found) else [str(data.folder) for data in found]
    subjects = dict.fromkeys(one.name for data in found for one in data.subjects if not one.row.is_base)
    has_shares = all(data.gain for data in found)
    arms = [row.name for row in found[0].record.arms if row.key]
    return Comparison(
        sweeps={label: data.folder for label, data in zip(labels, found, strict=True)},
        differences=differences,
        examples=[data.num_train for data in found],
        cells={name: [_read_cell(data, name, is_share=has_shares) for data in found] for name in subjects},
        enough={arm: [_describe_enough(data, arm) for data in found] for arm in arms},
        quantity=SHARE if has_shares else _name_metric(found[0]),
    )


def _name_metric(data: SweepData) -> str:
    return f"{format_metric(data.shown_metric.name)} on {'test' if data.evidence.means else 'validation'} data"


def _find_differences(sweeps: Sequence[SweepData]) -> dict[str, list[Any]]:
    """Returns the value in each sweep of each setting that differs, by the keys that their users named.

    Steps are left out if another setting differs and `sweep.epochs` is the same: they follow from the amount of data.
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
    if len(differences) > 1 and epochs[0] and len({*epochs}) == 1:
        differences.pop(STEPS_KEY, None)
    return differences


def _read_cell(data: SweepData, name: str, *, is_share: bool) -> Cell | None:
    if (one := data.find_subject(name)) is None:
        return None
    mean = data.evidence.mean(name)
    value, interval = data.find_score(one), mean.find_interval() if mean else None
    if is_share:
        value, interval = data.find_share(one)
    verdicts = {row.subject: row.verdict for row in data.evidence.answers if row.name == "as_good_as_full"}
    return Cell(value=value, interval=interval, verdict=verdicts.get(name, ""))


def _describe_enough(data: SweepData, arm: str) -> str:
    """Returns the smallest value of an arm that is enough: `4`, `at most 4`, `only 64`, or `open`."""
    answer = data.evidence.find_answer("smallest", arm)
    chosen = answer.good.subject if answer.good else answer.largest if answer.state == "settled" else None
    if (found := data.find_subject(chosen)) is None:
        return "open" if answer.rows else UNKNOWN
    about = "only " if answer.good is None else "" if answer.state == "settled" else "at most "
    return about + format_setting(found.subject.value)


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
    """Returns the table for a terminal, and the settings in which the sweeps differ."""
    title = Text(comparison.quantity, style="bold")
    table = Table("", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for label in comparison.sweeps:
        table.add_column(Text(label), overflow="fold")
    for row in list_rows(comparison):
        table.add_row(*map(Text, row))
    keys = [f"`{key}`" for key in comparison.differences]
    said = f"The sweeps differ in {join_words(keys)}." if keys else "The sweeps have the same settings."
    return Group(table, Text(f"• {said}"))
