"""TensorBoard: an HParams row per run, and per sweep a board that shows its arms side by side.

This needs TensorBoard alone, neither TensorFlow nor torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
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
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lorasweep.config.ranges import is_number
from lorasweep.record import RunRecord
from lorasweep.redaction import redact
from lorasweep.report.summary import Summary, tabulate_arms
from lorasweep.report.sweep_data import SweepData
from lorasweep.wording import format_metric

HPARAMS_FOLDER = "hparams"
"""The row has a folder of its own in the run's, so that TensorBoard's table has its metrics and none of the curves."""
BOARD_FOLDER = "tensorboard"
"""The folder of the board in a sweep's `report/`."""
SUFFIX = ".lorasweep"
"""The end of the names of event files written here, by which a later call finds and replaces them."""

StepSummary = tuple[int, EventSummary]
"""A step and what TensorBoard shows at it."""


def write_run_hparams(record: RunRecord, folder: Path, swept: Mapping[str, Any]) -> None:
    """Writes a run's row in TensorBoard's HParams tab, in place of an earlier one; a run without a score gets no row.

    Args:
        record: The run's record.
        folder: The run's folder, which names the row.
        swept: The keys (dotted) and values that tell the run from others.
    """
    if record.score is None:
        return
    metrics: dict[str, float] = {f"best/{record.metric}": record.score}
    if record.metric in record.test:
        metrics[f"test/{record.metric}"] = record.test[record.metric]
    metrics |= {name: getattr(record, name) for name in ("trainable_params", "peak_memory_bytes", "wall_s")}
    # A number stays a number and everything else becomes text, so that a column keeps its type over runs. A None would
    # turn TensorBoard's whole column into text.
    settings = {
        key: float(value) if is_number(value) else str(redact(str(value)))
        for key, value in {"arm": record.arm or record.config["method"]["name"], **swept}.items()
        if value is not None
    }
    session = hparams_pb(settings, trial_id="/".join(folder.absolute().parts[-2:]))
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    ended = EventSummary()
    ended.value.add(
        tag=hparams_metadata.SESSION_END_INFO_TAG,
        metadata=hparams_metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end)),
        tensor=hparams_metadata.NULL_TENSOR,
    )
    values = [_scalar(name, value) for name, value in metrics.items() if math.isfinite(value)]
    _write_events(folder / HPARAMS_FOLDER, [(0, one) for one in (session, *values, ended)])


def write_board(summary: Summary, folder: Path) -> None:
    """Writes a sweep's results for TensorBoard.

    - Scalars: the best validation curve of each arm.
    - Custom scalars: those side by side, and every run's curves.
    - Text: the report's sentences and the table of arms.

    Figures are not written as images: plotly draws in a browser, and the page has them.

    Args:
        summary: The content of the report.
        folder: The folder to write into. A board written before is replaced.
    """
    data = summary.data
    bests = {f"best/{arm.name}": arm.best for arm in data.arms if arm.best}
    curves = [(step, _scalar(tag, value)) for tag, best in bests.items() for step, value in best.curve]
    text = text_pb("report", _as_markdown(summary))
    _write_events(folder, [(0, _layout(data, [*bests])), (0, text), *curves])


def _as_markdown(summary: Summary) -> str:
    """Returns the report's sentences and the table of arms for TensorBoard's text dashboard."""
    rows = tabulate_arms(summary.data)
    table = [[*rows], ["---"] * len(rows), *zip(*rows.values(), strict=True)]
    # A bar in a name would end the cell.
    lines = [f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |" for cells in table]
    return "\n".join([*(f"- {sentence}" for sentence in summary.sentences), "", *lines])


def _layout(data: SweepData, tags: Sequence[str]) -> EventSummary:
    """Returns the charts of the Custom Scalars tab."""
    metric = format_metric(data.record.metric)

    def chart(title: str, *shown: str) -> layout_pb2.Chart:
        patterns = [f"^{_match_exactly(tag)}$" for tag in shown]
        return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=patterns))

    charts = [
        chart(f"{metric} on validation data: best trial of each arm", *tags),
        chart(f"{metric} on validation data: every run", f"validation/{data.record.metric}"),
        chart("training loss", "train/loss"),
    ]
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title=data.record.name, chart=charts)])
    summary = EventSummary()
    summary.value.add(
        tag=layout_metadata.CONFIG_SUMMARY_TAG,
        metadata=layout_metadata.create_summary_metadata(),
        tensor=TensorProto(dtype=DT_STRING, string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto()),
    )
    return summary


def _match_exactly(tag: str) -> str:
    """Returns a regular expression for the tag alone.

    `re.escape` won't do: TensorBoard reads it as RE2, its page as JavaScript, and they refuse some of its escapes.
    """
    return "".join(c if c.isalnum() or c in "/_-" else f"\\{c}" if c in "\\^]" else f"[{c}]" for c in tag)


def _scalar(tag: str, value: float) -> EventSummary:
    return EventSummary(value=[EventSummary.Value(tag=tag, simple_value=value)])


def _write_events(folder: Path, summaries: Sequence[StepSummary]) -> None:
    """Writes one event file in place of the ones written here before."""
    old = list(folder.glob(f"events.*{SUFFIX}"))
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for step, summary in summaries:
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()
    # The new file is there before the old ones go.
    for path in old:
        path.unlink()
