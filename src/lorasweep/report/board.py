"""TensorBoard: an HParams row per run, and per sweep one chart with the best curve of each arm.

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
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from lorasweep.config.ranges import is_number
from lorasweep.record import RunRecord
from lorasweep.redaction import redact
from lorasweep.report.findings import describe_pair
from lorasweep.report.sweep_data import SweepData

HPARAMS_FOLDER = "hparams"
"""The row has a separate folder in the run's, so that TensorBoard's table has the row's metrics and no curves."""
BOARD_FOLDER = "tensorboard"
"""The folder in a sweep's `report/` with the best curves; it has a folder per arm."""
SUFFIX = ".lorasweep"
"""The end of the names of event files written here, by which a later call finds and replaces them."""

StepSummary = tuple[int, EventSummary]
"""A step and what TensorBoard shows at it."""


def write_run_hparams(record: RunRecord, folder: Path, swept: Mapping[str, Any]) -> None:
    """Writes a run's row in TensorBoard's HParams tab, in place of an earlier one; a run without a score gets no row.

    Args:
        record: The run's record.
        folder: The run's folder, which names the row.
        swept: The keys (dotted) and values that distinguish the run from others.
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
        for key, value in {
            "arm": record.arm or record.config["method"]["name"],
            "status": record.status,
            **swept,
        }.items()
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


def write_board(data: SweepData, folder: Path) -> None:
    """Writes the best validation curve of each arm, and the verdicts as a text.

    TensorBoard draws the curves in one chart, because they share a tag.
    """
    for arm in data.arms:
        if arm.best:
            curve = [(step, _scalar(f"best/{data.record.metric}", value)) for step, value in arm.best.curve]
            _write_events(folder / arm.name, curve)
    if data.evidence.pairs:
        verdicts = "\n".join(f"- {describe_pair(pair, groups=data.example_groups)}." for pair in data.evidence.pairs)
        _write_events(folder, [(0, _text("verdicts", verdicts))])


def _text(tag: str, markdown: str) -> EventSummary:
    metadata = text_metadata.create_summary_metadata(display_name=tag, description="")
    return EventSummary(value=[EventSummary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([markdown]))])


def _scalar(tag: str, value: float) -> EventSummary:
    return EventSummary(value=[EventSummary.Value(tag=tag, simple_value=value)])


def _write_events(folder: Path, summaries: Sequence[StepSummary]) -> None:
    """Writes one event file in place of earlier ones."""
    old = list(folder.glob(f"events.*{SUFFIX}"))
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for step, summary in summaries:
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()
    # The new file is there before the old ones go.
    for path in old:
        path.unlink()
