"""TensorBoard: one HParams row per run, and per sweep a board that puts its arms' validation curves side by side.

`training`'s caller writes the rows, `write` the board. Both need TensorBoard alone, neither TensorFlow nor torch.
"""

from __future__ import annotations

import math
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
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lorasweep.report.tables import SweepData
from lorasweep.wording import format_metric

HPARAMS_FOLDER = "hparams"
"""Folder in a run's folder. Its own, so that TensorBoard's table has the row's metrics and none of the run's curves."""
BOARD_FOLDER = "tensorboard"
"""Folder in a sweep's `report/`."""
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


def write_board(data: SweepData, folder: Path) -> None:
    """Writes the best validation curve of each arm and a custom-scalars layout that shows them in one chart.

    Args:
        data: The sweep.
        folder: Where to write, inside the sweep's folder; a board written before is replaced.
    """
    bests = [(arm, arm.best) for arm in data.arms if arm.best]
    tags = {arm.name: f"best/{arm.name}" for arm, _ in bests}
    curves = [(step, _scalar(tags[arm.name], value)) for arm, best in bests for step, value in best.curve]
    _write_events(folder, [(0, _layout(data, list(tags.values()))), *curves])


def _layout(data: SweepData, tags: list[str]) -> EventSummary:
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
    category = layout_pb2.Category(title=data.record.name, chart=[side_by_side, every_run, loss])
    content = layout_pb2.Layout(category=[category]).SerializeToString()
    summary = EventSummary()
    summary.value.add(
        tag=layout_metadata.CONFIG_SUMMARY_TAG,
        metadata=layout_metadata.create_summary_metadata(),
        tensor=TensorProto(dtype=DT_STRING, string_val=[content], tensor_shape=TensorShapeProto()),
    )
    return summary


def _literal(tag: str) -> str:
    """Returns a regular expression (RE2 in TensorBoard, JavaScript in its page) that matches the tag alone."""
    return "".join(c if c.isalnum() or c in "/_-" else f"[{c}]" if c not in "\\^]" else f"\\{c}" for c in tag)


def _scalar(tag: str, value: float) -> EventSummary:
    return EventSummary(value=[EventSummary.Value(tag=tag, simple_value=value)])


def _is_shown(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _column_value(value: Any) -> float | str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else str(value)


def _write_events(folder: Path, summaries: list[tuple[int, EventSummary]]) -> None:
    """Writes (step, summary) pairs as one event file in place of the ones written here before."""
    old = list(folder.glob(f"events.*{SUFFIX}"))
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for step, summary in summaries:
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()
    for path in old:
        path.unlink()
