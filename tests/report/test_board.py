"""What TensorBoard reads: rows of the HParams tab, the best curves of a sweep's arms, figures and verdicts."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import metadata

from lorasweep.record import read_run
from lorasweep.report import write_report
from lorasweep.report.answers import describe_answer
from lorasweep.report.board import BOARD_FOLDER, HPARAMS_FOLDER, write_run_hparams

from .conftest import edit_json


@pytest.fixture
def board(confirmed: Path) -> Path:
    """The TensorBoard folder of a confirmed sweep's report."""
    write_report(confirmed)
    return confirmed / "report" / BOARD_FOLDER


def load(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def row_of(folder: Path) -> tuple[str, dict[str, object], dict[str, float]]:
    """Returns the name, the settings and the metrics of a row in HParams."""
    events = load(folder)
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    settings = {key: getattr(value, str(value.WhichOneof("kind"))) for key, value in start.hparams.items()}
    return start.group_name, settings, {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def test_row_has_numbers_as_numbers_and_the_rest_as_text(sweep: Path) -> None:
    run = sweep / "runs/full-0000"
    record = read_run(run)
    for rank in (4, 8):  # the second row replaces the first
        swept = {"method.rank": rank, "method.targets": ["q_proj", "v_proj"], "flag": True, "seed": None}
        write_run_hparams(record, run, swept)
    assert len(list((run / HPARAMS_FOLDER).iterdir())) == 1
    name, settings, metrics = row_of(run / HPARAMS_FOLDER)
    targets = "['q_proj', 'v_proj']"
    assert name == "runs/full-0000"
    assert settings == {"status": "complete", "method.rank": 8.0, "method.targets": targets, "flag": "True"}
    assert metrics.keys() == {"best/bits_per_byte", "trainable_params", "peak_memory_bytes", "wall_s"}
    assert metrics["trainable_params"] == record.trainable_params


def test_run_without_a_score_has_no_row(sweep: Path) -> None:
    run = sweep / "runs/lora-0004"
    write_run_hparams(read_run(run), run, {})
    assert not (run / HPARAMS_FOLDER).exists()


def test_rows_by_name_are_complete_trials_from_best_to_worst_and_then_the_others(board: Path) -> None:
    rows = [row_of(folder) for folder in (board / "trials").iterdir()]
    rows.sort(key=lambda row: row[0])  # TensorBoard's order
    statuses = [settings["status"] for _, settings, _ in rows]
    num_complete = statuses.count("complete")
    assert statuses[:num_complete] == ["complete"] * num_complete
    assert {*statuses[num_complete:]} == {"pruned", "failed"}
    assert len(rows) == 25
    scores = [metrics["best/bits_per_byte"] for _, _, metrics in rows[:num_complete]]
    assert scores == sorted(scores)
    assert re.fullmatch(r"01 (full|lora)-\d{4} of quickstart", rows[0][0])
    # Arms' winners have a score on test data.
    assert sorted(str(row[1]["arm"]) for row in rows if "test/bits_per_byte" in row[2]) == ["frozen", "full", "lora"]


def test_row_of_a_paused_trial_becomes_pruned_with_the_next_report(sweep: Path) -> None:
    def set_state(state: str) -> None:
        edit_json(sweep / "sweep.json", lambda raw: raw["trials"][3].update(state=state))
        write_report(sweep)

    set_state("paused")
    row = sweep / "report" / BOARD_FOLDER / "trials/lora-0002"
    assert row_of(row)[1]["status"] == "paused"
    set_state("pruned")
    assert row_of(row)[1]["status"] == "pruned"


def test_custom_scalars_have_one_chart_with_the_best_curve_of_each_arm(board: Path) -> None:
    (layout_tensor,) = load(board / "arms").Tensors(layout_metadata.CONFIG_SUMMARY_TAG)
    (content,) = layout_tensor.tensor_proto.string_val
    (category,) = layout_pb2.Layout.FromString(content).category
    (chart,) = category.chart
    (pattern,) = chart.multiline.tag
    matches = {
        str(path.parent.relative_to(board)): tags
        for path in board.rglob("events.*")
        if (tags := [tag for tag in load(path.parent).Tags()["scalars"] if re.match(pattern, tag)])
    }
    # TensorBoard colours by run, so each arm has its own.
    assert sorted(matches) == ["arms/frozen", "arms/full", "arms/lora"]
    (tag,) = matches["arms/lora"]
    assert [point.step for point in load(board / "arms/lora").Scalars(tag)] == [0, 25, 50, 75, 100, 125, 150]
    frozen = load(board / "arms/frozen").Scalars(tag)
    assert [point.step for point in frozen] == [0, 150]
    assert frozen[0].value == frozen[1].value


@pytest.mark.slow
@pytest.mark.usefixtures("with_images")
def test_figures_are_images(board: Path) -> None:
    events = load(board / "arms")
    tags = events.Tags()["images"]
    assert {"figures/Learning curves", "figures/Test score by arm"} <= {*tags}
    for tag in tags:
        assert Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)).format == "PNG"


def test_answers_and_verdicts_are_texts(confirmed: Path) -> None:
    summary = write_report(confirmed)
    events = load(confirmed / "report" / BOARD_FOLDER / "arms")
    answers, verdicts = (events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in ("answers", "verdicts"))
    assert all(line.text in answers for line in summary.answers)
    assert all(describe_answer(answer, summary.data) in verdicts for answer in summary.data.evidence.answers)


def test_report_loads_neither_torch_nor_optuna_and_matplotlib_only_to_write() -> None:
    unwanted = {"torch", "lightning", "optuna", "tensorflow", "transformers", "matplotlib"}
    code = f"import sys, lorasweep.report; print(*({unwanted} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
