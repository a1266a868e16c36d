"""What TensorBoard reads: rows of the HParams tab and a sweep's board."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from lorasweep.record import read_run
from lorasweep.report import write_report
from lorasweep.report.board import BOARD_FOLDER, HPARAMS_FOLDER, write_run_hparams

from .conftest import edit_json


def load(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def row_of(run: Path) -> tuple[dict[str, object], dict[str, float]]:
    """Returns the settings and metrics of a run's HParams row."""
    events = load(run / HPARAMS_FOLDER)
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    settings = {key: getattr(value, str(value.WhichOneof("kind"))) for key, value in hparams.items()}
    return settings, {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def test_row_has_numbers_as_numbers_and_the_rest_as_text(sweep: Path) -> None:
    run = sweep / "runs/full-0000"
    record = read_run(run)
    for rank in (4, 8):  # the second row replaces the first
        swept = {"method.rank": rank, "method.targets": ["q_proj", "v_proj"], "flag": True, "seed": None}
        write_run_hparams(record, run, swept)
    assert len(list((run / HPARAMS_FOLDER).iterdir())) == 1
    settings, metrics = row_of(run)
    targets = "['q_proj', 'v_proj']"
    assert settings == {"arm": "full", "method.rank": 8.0, "method.targets": targets, "flag": "True"}
    assert metrics.keys() == {"best/bits_per_byte", "trainable_params", "peak_memory_bytes", "wall_s"}
    assert metrics["trainable_params"] == record.trainable_params


def test_run_without_a_score_has_no_row(sweep: Path) -> None:
    run = sweep / "runs/lora-0004"
    write_run_hparams(read_run(run), run, {})
    assert not (run / HPARAMS_FOLDER).exists()


def test_board_puts_the_best_curve_of_each_arm_in_one_chart(sweep: Path) -> None:
    write_report(sweep)
    events = load(sweep / "report" / BOARD_FOLDER)
    assert sorted(events.Tags()["scalars"]) == ["best/frozen", "best/full", "best/lora"]
    assert [point.step for point in events.Scalars("best/lora")] == [0, 25, 50, 75, 100, 125, 150]
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert list(layout.category[0].chart[0].multiline.tag) == ["^best/frozen$", "^best/lora$", "^best/full$"]


def test_board_has_the_sentences_and_the_table_as_text(confirmed: Path) -> None:
    summary = write_report(confirmed)
    content = load(confirmed / "report" / BOARD_FOLDER).Tensors("report")[0].tensor_proto.string_val[0].decode()
    assert all(sentence in content for sentence in summary.sentences)
    assert "| lora | " in content


def test_arm_name_is_matched_literally(sweep: Path) -> None:
    def rename(raw: dict[str, list[dict[str, object]]]) -> None:
        raw["arms"][2]["name"] = "r=1.5^[x]"
        for trial in raw["trials"]:
            trial["arm"] = "r=1.5^[x]" if trial["arm"] == "full" else trial["arm"]

    edit_json(sweep / "sweep.json", rename)
    write_report(sweep)
    layout = layout_pb2.Layout()
    events = load(sweep / "report" / BOARD_FOLDER)
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert layout.category[0].chart[0].multiline.tag[2] == r"^best/r[=]1[.]5\^[[]x\]$"


def test_report_loads_neither_torch_nor_optuna() -> None:
    unwanted = {"torch", "lightning", "optuna", "tensorflow", "transformers"}
    code = f"import sys, lorasweep.report; print(*({unwanted} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
