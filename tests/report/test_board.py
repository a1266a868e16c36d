"""What TensorBoard reads: rows of the HParams tab and a sweep's board."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from lorasweep.report import write_report
from lorasweep.report.board import BOARD_FOLDER, HPARAMS_FOLDER, write_hparams

from .conftest import build_rank_arms, edit_json


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


def test_row_has_numbers_as_numbers_and_the_rest_as_text(tmp_path: Path) -> None:
    swept = {"method.rank": 8, "optim.lr": 0.25, "method.targets": ["q_proj", "v_proj"], "flag": True}
    write_hparams(tmp_path, swept=swept, metrics={"best/bits_per_byte": 1.5, "trainable_params": 4096})
    settings, metrics = row_of(tmp_path)
    assert settings == {
        "method.rank": 8.0,
        "optim.lr": 0.25,
        "method.targets": "['q_proj', 'v_proj']",
        "flag": "True",
    }
    assert metrics == {"best/bits_per_byte": 1.5, "trainable_params": 4096.0}


def test_row_leaves_out_what_has_no_value(tmp_path: Path) -> None:
    write_hparams(tmp_path, swept={"a": None, "b": math.nan, "c": 1}, metrics={"x": None, "y": math.inf, "z": 2.0})
    assert row_of(tmp_path) == ({"c": 1.0}, {"z": 2.0})


def test_row_written_again_replaces_the_first(tmp_path: Path) -> None:
    for rank in (1, 2):
        write_hparams(tmp_path, swept={"method.rank": rank}, metrics={"score": float(rank)})
    assert len(list((tmp_path / HPARAMS_FOLDER).iterdir())) == 1
    assert row_of(tmp_path) == ({"method.rank": 2.0}, {"score": 2.0})


def test_board_puts_the_best_curve_of_each_arm_in_one_chart(sweep: Path) -> None:
    write_report(sweep)
    events = load(sweep / "report" / BOARD_FOLDER)
    assert sorted(events.Tags()["scalars"]) == ["best/frozen", "best/full", "best/lora"]
    assert [point.step for point in events.Scalars("best/lora")] == [0, 25, 50, 75, 100, 125, 150]
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert list(layout.category[0].chart[0].multiline.tag) == ["^best/frozen$", "^best/lora$", "^best/full$"]


def test_board_has_a_row_per_arm_with_its_best_and_its_confirmed_score(confirmed: Path) -> None:
    summary = write_report(confirmed)
    settings, metrics = row_of(confirmed / "report" / BOARD_FOLDER / "arms" / "01-lora")
    best, found = summary.data.arms[1].best, summary.data.evidence.arm("lora")
    assert best
    assert found
    assert found.interval
    assert settings["arm"] == "lora"
    assert settings["optim.lr"] == pytest.approx(best.params["optim.lr"])
    # TensorBoard keeps single precision
    assert metrics["best/bits_per_byte"] == pytest.approx(best.value, rel=1e-6)
    assert metrics["confirmed/bits_per_byte"] == pytest.approx(found.mean, rel=1e-6)
    assert metrics["confirmed/bits_per_byte_high"] == pytest.approx(found.interval[1], rel=1e-6)


def test_board_shows_confirmed_scores_over_rank_with_their_intervals(tmp_path: Path) -> None:
    sweep = build_rank_arms(tmp_path, {1: 1.8, 4: 1.7, 16: 1.69})
    write_report(sweep)
    events = load(sweep / "report" / BOARD_FOLDER)
    assert [point.step for point in events.Scalars("confirmed_by_rank/0/mean")] == [1, 4, 16]
    low, high = (events.Scalars(f"confirmed_by_rank/0/{end}")[0].value for end in ("low", "high"))
    assert low < events.Scalars("confirmed_by_rank/0/mean")[0].value < high
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (margins,) = [chart.margin.series[0] for chart in layout.category[0].chart if chart.HasField("margin")]
    assert (margins.value, margins.lower) == ("confirmed_by_rank/0/mean", "confirmed_by_rank/0/low")


def test_board_has_the_sentences_and_the_table_as_text(confirmed: Path) -> None:
    summary = write_report(confirmed)
    content = load(confirmed / "report" / BOARD_FOLDER).Tensors("report")[0].tensor_proto.string_val[0].decode()
    assert all(sentence in content for sentence in summary.sentences)
    assert "| lora | " in content


def test_arm_named_like_a_path_stays_in_the_board(sweep: Path) -> None:
    def rename(raw: dict[str, list[dict[str, object]]]) -> None:
        raw["arms"][2]["name"] = "../../x"
        for trial in raw["trials"]:
            trial["arm"] = "../../x" if trial["arm"] == "full" else trial["arm"]

    edit_json(sweep / "sweep.json", rename)
    write_report(sweep)
    assert (sweep / "report" / BOARD_FOLDER / "arms" / "02-______x").is_dir()
    assert not (sweep / "report" / "x").exists()


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
