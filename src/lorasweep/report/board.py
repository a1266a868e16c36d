"""TensorBoard: an HParams row per run, and per sweep a board that shows its arms side by side.

This needs TensorBoard alone, neither TensorFlow nor torch.
"""

from __future__ import annotations

import math
import re
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
from lorasweep.report.summary import Summary
from lorasweep.report.sweep_data import ArmData, SweepData, group_by_rank
from lorasweep.wording import (
    UNKNOWN,
    format_count,
    format_estimate,
    format_metric,
    format_score,
    format_share,
)

HPARAMS_FOLDER = "hparams"
"""The row has a folder of its own in the run's, so that TensorBoard's table has its metrics and none of the curves."""
BOARD_FOLDER = "tensorboard"
"""The folder of the board in a sweep's `report/`."""
ARMS_FOLDER = "arms"
"""The folder in the board's with an HParams row per arm."""
COSTS = ("trainable_params", "peak_memory_bytes", "wall_s")
"""The fields of a run's record that the HParams rows have."""
BOUNDS = ("mean", "low", "high")
SUFFIX = ".lorasweep"
"""The end of the names of event files written here, by which a later call finds and replaces them."""

StepSummary = tuple[int, EventSummary]
"""A step and what TensorBoard shows at it."""


def write_hparams(folder: Path, *, swept: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
    """Writes a run's row in TensorBoard's HParams tab; a row written before is replaced.

    A number stays a number, everything else becomes text, so that a column keeps its type over runs. Values that are
    None or not finite are left out: a None would turn TensorBoard's whole column into text.

    Args:
        folder: The run's folder, which names the row.
        swept: The swept keys (dotted) and their values.
        metrics: The best value of the run's metric, trainable parameters, peak memory in bytes, time in seconds.
    """
    settings = {
        key: float(value) if is_number(value) else str(redact(str(value)))
        for key, value in swept.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }
    session = hparams_pb(settings, trial_id="/".join(folder.absolute().parts[-2:]))
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    ended = EventSummary()
    ended.value.add(
        tag=hparams_metadata.SESSION_END_INFO_TAG,
        metadata=hparams_metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end)),
        tensor=hparams_metadata.NULL_TENSOR,
    )
    values = [_scalar(name, value) for name, value in metrics.items() if value is not None and math.isfinite(value)]
    _write_events(folder / HPARAMS_FOLDER, [(0, one) for one in (session, *values, ended)])


def write_run_hparams(record: RunRecord, folder: Path, swept: Mapping[str, Any]) -> None:
    """Writes the HParams row of a run; a run that was not evaluated gets none.

    Args:
        record: The run's record.
        folder: The run's folder.
        swept: The keys (dotted) and values that tell the run from others.
    """
    if record.score is None:
        return
    metrics = {
        f"best/{record.metric}": record.score,
        **({f"test/{record.metric}": record.test[record.metric]} if record.metric in record.test else {}),
        **{name: float(getattr(record, name)) for name in COSTS},
    }
    write_hparams(folder, swept={"arm": record.arm or record.config["method"]["name"], **swept}, metrics=metrics)


def write_board(summary: Summary, folder: Path) -> None:
    """Writes a sweep's results for TensorBoard.

    - Scalars: the best validation curve of each arm; confirmed scores with their intervals over rank (the step).
    - Custom scalars: those side by side, and every run's curves.
    - Text: the report's sentences and the table of arms.
    - HParams: a row per arm with its best and its confirmed score, beside the row that each run wrote.

    Figures are not written as images: plotly draws in a browser, and the page has them.

    Args:
        summary: The content of the report.
        folder: The folder to write into. A board written before is replaced.
    """
    data = summary.data
    bests = {f"best/{arm.name}": arm.best for arm in data.arms if arm.best}
    groups = [
        [a for a in group if (e := data.evidence.arm(a.name)) and e.interval] for group in group_by_rank(data.arms)
    ]
    groups = [group for group in groups if len(group) > 1]
    events = [(step, _scalar(tag, value)) for tag, best in bests.items() for step, value in best.curve]
    for index, group in enumerate(groups):
        events += _list_confirmed(index, group, data)
    text = text_pb("report", _as_markdown(summary))
    _write_events(folder, [(0, _layout(data, [*bests], num_groups=len(groups))), (0, text), *events])
    for index, arm in enumerate(data.arms):
        if arm.best:
            name = re.sub(r"[^A-Za-z0-9_-]", "_", arm.name)[:80]
            _write_arm(arm, data, folder / ARMS_FOLDER / f"{index:02d}-{name}")


def _write_arm(arm: ArmData, data: SweepData, folder: Path) -> None:
    metric, found, best = data.record.metric, data.evidence.arm(arm.name), arm.best
    low, high = found.interval if found and found.interval else (None, None)
    metrics = {
        f"best/{metric}": best.value if best else None,
        f"confirmed/{metric}": found.mean if found else None,
        f"confirmed/{metric}_low": low,
        f"confirmed/{metric}_high": high,
        "share_of_full_gain": data.share_of_full_gain(best.value if best else None),
        **{name: arm.cost(name) for name in COSTS},
    }
    settings = best.params if best else {}
    write_hparams(folder, swept={"arm": arm.name, "row": "best of arm", **settings}, metrics=metrics)


def _list_confirmed(index: int, group: Sequence[ArmData], data: SweepData) -> list[StepSummary]:
    """Returns the confirmed means and intervals of arms that differ in rank alone, with the rank as the step."""
    found = [(round(arm.rank or 0), data.evidence.arm(arm.name)) for arm in group]
    return [
        (rank, _scalar(f"confirmed_by_rank/{index}/{name}", value))
        for rank, evidence in found
        if evidence and evidence.interval
        for name, value in zip(BOUNDS, (evidence.mean, *evidence.interval), strict=True)
    ]


def _as_markdown(summary: Summary) -> str:
    """Returns the report's sentences and a table of arms for TensorBoard's text dashboard."""
    data = summary.data
    scores = [arm.best.value if arm.best else None for arm in data.arms]
    table = [["arm", "test", "search", "of full's gain", "trained"], ["---"] * 5]
    for arm, score in zip(data.arms, scores, strict=True):
        found = data.evidence.arm(arm.name)
        table.append(
            [
                arm.name.replace("|", "¦"),
                format_estimate(found.mean, found.interval) if found else UNKNOWN,
                format_score(score, beside=scores),
                format_share(data.share_of_full_gain(score)),
                format_count(arm.cost("trainable_params")),
            ]
        )
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([*(f"- {sentence}" for sentence in summary.sentences), "", *lines])


def _layout(data: SweepData, tags: Sequence[str], *, num_groups: int) -> EventSummary:
    """Returns the charts of the Custom Scalars tab."""
    metric = format_metric(data.record.metric)

    def chart(title: str, *shown: str) -> layout_pb2.Chart:
        patterns = [f"^{_match_exactly(tag)}$" for tag in shown]
        return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=patterns))

    def chart_of_group(index: int) -> layout_pb2.Chart:
        mean, low, high = (f"confirmed_by_rank/{index}/{name}" for name in BOUNDS)
        series = layout_pb2.MarginChartContent.Series(value=mean, lower=low, upper=high)
        return layout_pb2.Chart(
            title=f"{metric} on test data over rank (the step), with 95 % intervals",
            margin=layout_pb2.MarginChartContent(series=[series]),
        )

    charts = [
        chart(f"{metric} on validation data: best trial of each arm", *tags),
        *map(chart_of_group, range(num_groups)),
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
