"""Compares sweeps, such as those that differ in the amount of training data alone, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.config.build import flatten
from lorasweep.errors import ConfigError
from lorasweep.report.facts import list_subject_rows
from lorasweep.report.sweep_data import SweepData, load_sweep_data
from lorasweep.wording import UNKNOWN, count_percent_decimals, format_score, format_setting, format_share_estimate

if TYPE_CHECKING:
    import pandas

NOT_COMPARED = ("sweep.output.", "worker.", "logger.", "callbacks.")
"""Settings that decide no result, with those below them."""


def compare_sweeps(folders: Sequence[str | Path]) -> pandas.DataFrame:
    """Returns a row for each subject of each sweep, with the settings in which the sweeps differ as columns.

    >>> lorasweep.compare_sweeps(["outputs/tiny"])["metric"].unique().tolist()
    ['bits_per_byte']

    Other columns: `sweep` (its folder), `examples` (of training; 0 if not known), `subject`, `metric`, `score` (on test
    data, or of the search if nothing is confirmed), `share_of_full_gain` with its interval `share_low` to `share_high`,
    and the verdicts on the questions `as_good_as_full` and `smallest`.

    Raises:
        ConfigError: A sweep is not complete.
        RecordError: A folder is not a sweep, or its record is damaged.
    """
    import pandas  # noqa: PLC0415 (slow to import)

    found = [load_sweep_data(Path(folder)) for folder in folders]
    for data in found:
        if data.record.status != "complete":
            raise ConfigError(f"{str(data.folder)!r} must be complete, but is not. Type `{data.completing_command}`.")
    differences = _find_differences(found)
    return pandas.DataFrame(
        [row for data, settings in zip(found, differences, strict=True) for row in _list_rows(data, settings)]
    )


def _find_differences(sweeps: Sequence[SweepData]) -> list[dict[str, Any]]:
    """Returns for each sweep the values of the settings that differ, by the keys that their users named."""
    prefixes = {"file.settings.": "", "file.arms.": "arms.", "overrides.": ""}  # the command line wins
    named: list[dict[str, Any]] = []
    for data in sweeps:
        items = flatten(data.record.definition).items()
        found = [(prefix, key, value) for prefix in prefixes for key, value in items if key.startswith(prefix)]
        named.append({prefixes[prefix] + key.removeprefix(prefix): value for prefix, key, value in found})
    defaults = [flatten(next((run.config for run in data.run_records), {})) for data in sweeps]
    keys = dict.fromkeys(key for one in named for key in one if not f"{key}.".startswith(NOT_COMPARED))
    values = {key: [one.get(key, of.get(key)) for one, of in zip(named, defaults, strict=True)] for key in keys}
    differing = {key: found for key, found in values.items() if any(value != found[0] for value in found)}
    return [{key: found[place] for key, found in differing.items()} for place in range(len(sweeps))]


def _list_rows(data: SweepData, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    verdicts = {(row.name, row.subject): row.verdict for row in data.evidence.answers}
    for one, row in zip(data.subjects, list_subject_rows(data), strict=True):
        if not one.row.is_base:
            low, high = row["share_interval"] or (None, None)
            yield {
                "sweep": str(data.folder),
                **settings,
                "examples": data.num_train,
                "subject": one.name,
                "metric": data.shown_metric.name,
                "score": data.find_score(one),
                "share_of_full_gain": row["share_of_full_gain"],
                "share_low": low,
                "share_high": high,
                "as_good_as_full": verdicts.get(("as_good_as_full", one.name)),
                "smallest": verdicts.get(("smallest", one.name)),
            }


def format_comparison(table: pandas.DataFrame) -> str:
    """Returns the table of `compare_sweeps` for a terminal; shares have their intervals beside them."""
    shown = table.astype(object).where(table.notna(), None)
    columns = zip(shown["share_of_full_gain"], shown.pop("share_low"), shown.pop("share_high"), strict=True)
    shares = [(share, None if low is None else (low, high)) for share, low, high in columns]
    decimals = count_percent_decimals(interval for _, interval in shares)
    shown["share_of_full_gain"] = [format_share_estimate(*share, decimals=decimals) for share in shares]
    shown["score"] = shown["score"].map(format_score)
    shown = shown.rename(columns={"share_of_full_gain": "of full's gain"})
    return str(shown.map(lambda value: UNKNOWN if value is None else format_setting(value)).to_string(index=False))
