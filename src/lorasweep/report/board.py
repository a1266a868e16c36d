"""TensorBoard: one HParams row per run, and per sweep a board with its arms side by side.

`training`'s caller writes the rows, `write` the board. Both need TensorBoard alone, neither TensorFlow nor torch.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary as EventSummary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lorasweep.record import RunRecord
from lorasweep.redaction import redact
from lorasweep.report.advice.noise import rank_groups, rank_of
from lorasweep.report.summary import ArmSummary, Summary
from lorasweep.report.tables import Arm, SweepData
from lorasweep.wording import (
    UNKNOWN,
    format_count,
    format_estimate,
    format_metric,
    format_score,
    format_share,
    visible,
)

HPARAMS_FOLDER = "hparams"
"""Folder in a run's folder. Its own, so that TensorBoard's table has the row's metrics and none of the run's curves."""
BOARD_FOLDER = "tensorboard"
"""Folder in a sweep's `report/`."""
ARMS_FOLDER = "arms"
"""Folder in the board's, with a row of the HParams tab per arm."""
MARGINS = ("mean", "low", "high")
SUFFIX = ".lorasweep"
"""End of the names of event files written here, by which a later call finds and replaces them."""


def write_hparams(folder: Path, *, swept: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
    """Writes a run's row in TensorBoard's HParams tab; a row written before is replaced.

    Numbers stay numbers, everything else becomes text, so that a column keeps its type over runs. What is None or not
    finite is left out: a blank cell, where a None would turn TensorBoard's whole column into text.

    Args:
        folder: The run's folder. The row is named by it.
        swept: Swept keys (dotted) and their values.
        metrics: Best value of the run's metric, trainable parameters, peak memory in bytes, time in seconds.
    """
    settings = {key: _column_value(value) for key, value in swept.items() if _is_shown(value)}
    session = hparams_pb(settings, trial_id="/".join(folder.absolute().parts[-2:]))
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    ended = EventSummary()
    ended.value.add(
        tag=hparams_metadata.SESSION_END_INFO_TAG,
        metadata=hparams_metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end)),
        tensor=hparams_metadata.NULL_TENSOR,
    )
    values = [_scalar(name, value) for name, value in metrics.items() if value is not None and math.isfinite(value)]
    _write_events(folder / HPARAMS_FOLDER, [(0, session), *((0, value) for value in values), (0, ended)])


def write_run_hparams(record: RunRecord, folder: Path, swept: Mapping[str, Any]) -> None:
    """Writes the row of a run that was evaluated.

    Args:
        record: The run's record.
        folder: Its folder.
        swept: Keys (dotted) and values that tell it from other runs.
    """
    if record.score is None:
        return
    metrics = {
        f"best/{record.metric}": record.score,
        "trainable_params": float(record.trainable_params),
        "peak_memory_bytes": float(record.peak_memory_bytes),
        "wall_s": record.wall_s,
    }
    if record.metric in record.test:
        metrics[f"test/{record.metric}"] = record.test[record.metric]
    write_hparams(folder, swept={"arm": record.arm or record.config["method"]["name"], **swept}, metrics=metrics)


def write_board(data: SweepData, summary: Summary, folder: Path) -> None:
    """Writes what the sweep found for TensorBoard.

    - Scalars: the best validation curve of each arm; confirmed scores with their intervals over rank (the step).
    - Custom scalars: those side by side, and every run's curves.
    - Text: the report's sentences and the table of arms.
    - HParams: a row per arm with its best and its confirmed score, beside the row that each run wrote.

    Figures are not written as images: plotly draws in a browser, and the page has them.

    Args:
        data: The sweep.
        summary: What it found.
        folder: Where to write, inside the sweep's folder; a board written before is replaced.
    """
    bests = [(arm, arm.best) for arm in data.arms if arm.best]
    tags = {arm.name: f"best/{arm.name}" for arm, _ in bests}
    curves = [(step, _scalar(tags[arm.name], value)) for arm, best in bests for step, value in best.curve]
    groups = _confirmed_groups(data)
    confirmed = [event for index, group in enumerate(groups) for event in _confirmed_events(index, group, data)]
    layout = _layout(data, list(tags.values()), groups=len(groups))
    _write_events(folder, [(0, layout), (0, _text("report", _markdown(summary))), *curves, *confirmed])
    for index, arm in enumerate(summary.arms):
        _write_arm(arm, summary, folder / ARMS_FOLDER / f"{index:02d}-{_file_name(arm.name)}")


def _write_arm(arm: ArmSummary, summary: Summary, folder: Path) -> None:
    if arm.best.params is None:
        return
    low, high = arm.confirmed.interval if arm.confirmed and arm.confirmed.interval else (None, None)
    metrics = {
        f"best/{summary.metric}": arm.best.score,
        f"confirmed/{summary.metric}": arm.confirmed.mean if arm.confirmed else None,
        f"confirmed/{summary.metric}_low": low,
        f"confirmed/{summary.metric}_high": high,
        "share_of_full_gain": arm.share_of_full_gain,
        "trainable_params": arm.trainable_params,
        "peak_memory_bytes": arm.peak_memory_bytes,
        "wall_s": arm.wall_s,
    }
    write_hparams(folder, swept={"arm": arm.name, "row": "best of arm", **arm.best.params}, metrics=metrics)


def _confirmed_groups(data: SweepData) -> list[list[Arm]]:
    """Returns confirmed arms with an interval that differ in rank alone."""
    groups = [[a for a in group if (e := data.evidence.arm(a.name)) and e.interval] for group in rank_groups(data.arms)]
    return [group for group in groups if len(group) > 1]


def _confirmed_events(index: int, group: list[Arm], data: SweepData) -> list[tuple[int, EventSummary]]:
    found = [(round(rank_of(arm) or 0), data.evidence.arm(arm.name)) for arm in group]
    return [
        (rank, _scalar(f"confirmed_by_rank/{index}/{name}", value))
        for rank, evidence in found
        if evidence and evidence.interval
        for name, value in zip(MARGINS, (evidence.mean, *evidence.interval), strict=True)
    ]


def _markdown(summary: Summary) -> str:
    """Returns the report's sentences and a table of arms as TensorBoard's text dashboard renders them."""
    header = ["arm", "test", "search", "of full's gain", "trained"]
    scores = [arm.best.score for arm in summary.arms]
    rows = [
        [
            arm.name,
            format_estimate(arm.confirmed.mean, arm.confirmed.interval) if arm.confirmed else UNKNOWN,
            format_score(arm.best.score, beside=scores),
            format_share(arm.share_of_full_gain),
            format_count(arm.trainable_params),
        ]
        for arm in summary.arms
    ]
    lines = (header, ["---"] * len(header), *([_unmarked(cell) for cell in cells] for cells in rows))
    table = [f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |" for cells in lines]
    return "\n".join([*(f"- {_unmarked(sentence)}" for sentence in summary.sentences), "", *table])


def _unmarked(text: str) -> str:
    """Returns text in which Markdown sees no link, image or HTML, which TensorBoard would show, and fetch."""
    text = visible(text).replace("<", "‹").replace("\\", "⧵")
    return re.sub(r"\](?=[(\[:])", "] ", text)


def _text(tag: str, content: str) -> EventSummary:
    summary = EventSummary()
    summary.value.add(
        tag=tag,
        metadata=text_metadata.create_summary_metadata(display_name=tag, description=""),
        tensor=TensorProto(dtype=DT_STRING, string_val=[content.encode()], tensor_shape=TensorShapeProto()),
    )
    return summary


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:80]


def _layout(data: SweepData, tags: list[str], *, groups: int) -> EventSummary:
    metric = format_metric(data.record.metric)
    side_by_side = layout_pb2.Chart(
        title=f"{metric} on validation data: best trial of each arm",
        multiline=layout_pb2.MultilineChartContent(tag=[f"^{_literal(tag)}$" for tag in tags]),
    )
    every_run = layout_pb2.Chart(
        title=f"{metric} on validation data: every run",
        multiline=layout_pb2.MultilineChartContent(tag=[f"^validation/{_literal(data.record.metric)}$"]),
    )
    loss = layout_pb2.Chart(title="training loss", multiline=layout_pb2.MultilineChartContent(tag=["^train/loss$"]))
    by_rank = [
        layout_pb2.Chart(
            title=f"{metric} on test data over rank (the step), with 95 % intervals",
            margin=layout_pb2.MarginChartContent(series=[_margin(index)]),
        )
        for index in range(groups)
    ]
    category = layout_pb2.Category(title=data.record.name, chart=[side_by_side, *by_rank, every_run, loss])
    content = layout_pb2.Layout(category=[category]).SerializeToString()
    summary = EventSummary()
    summary.value.add(
        tag=layout_metadata.CONFIG_SUMMARY_TAG,
        metadata=layout_metadata.create_summary_metadata(),
        tensor=TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=TensorShapeProto()),
    )
    return summary


def _margin(index: int) -> layout_pb2.MarginChartContent.Series:
    mean, low, high = (f"confirmed_by_rank/{index}/{name}" for name in MARGINS)
    return layout_pb2.MarginChartContent.Series(value=mean, lower=low, upper=high)


def _literal(tag: str) -> str:
    """Returns a regular expression (RE2 in TensorBoard, JavaScript in its page) that matches the tag alone."""
    return "".join(c if c.isalnum() or c in "/_-" else f"[{c}]" if c not in "\\^]" else f"\\{c}" for c in tag)


def _scalar(tag: str, value: float) -> EventSummary:
    return EventSummary(value=[EventSummary.Value(tag=visible(tag), simple_value=value)])


def _is_shown(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _column_value(value: Any) -> float | str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else visible(str(redact(str(value))))


def _write_events(folder: Path, summaries: list[tuple[int, EventSummary]]) -> None:
    """Writes (step, summary) pairs as one event file in place of the ones written here before."""
    old = list(folder.glob(f"events.*{SUFFIX}"))
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for step, summary in summaries:
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()
    for path in old:
        path.unlink()
