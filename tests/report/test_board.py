"""What TensorBoard reads: rows of the HParams tab and a sweep's best curves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lorasweep.record import read_run
from lorasweep.report import write_report
from lorasweep.report.board import BOARD_FOLDER, HPARAMS_FOLDER, write_run_hparams
from lorasweep.report.findings import describe_pair


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
    assert settings == {
        "arm": "full",
        "status": "complete",
        "method.rank": 8.0,
        "method.targets": targets,
        "flag": "True",
    }
    assert metrics.keys() == {"best/bits_per_byte", "trainable_params", "peak_memory_bytes", "wall_s"}
    assert metrics["trainable_params"] == record.trainable_params


def test_run_without_a_score_has_no_row(sweep: Path) -> None:
    run = sweep / "runs/lora-0004"
    write_run_hparams(read_run(run), run, {})
    assert not (run / HPARAMS_FOLDER).exists()


def test_best_curve_of_each_arm_has_a_folder_and_the_same_tag(sweep: Path) -> None:
    write_report(sweep)
    board = sweep / "report" / BOARD_FOLDER
    assert sorted(folder.name for folder in board.iterdir()) == ["frozen", "full", "lora"]
    points = load(board / "lora").Scalars("best/bits_per_byte")
    assert [point.step for point in points] == [0, 25, 50, 75, 100, 125, 150]


def test_verdicts_of_a_confirmed_sweep_are_a_text(confirmed: Path) -> None:
    pairs = write_report(confirmed).data.evidence.pairs
    (tensor,) = load(confirmed / "report" / BOARD_FOLDER).Tensors("verdicts")
    (text,) = tensor.tensor_proto.string_val
    assert all(describe_pair(pair, groups="documents") in text.decode() for pair in pairs)


def test_report_loads_neither_torch_nor_optuna() -> None:
    unwanted = {"torch", "lightning", "optuna", "tensorflow", "transformers"}
    code = f"import sys, lorasweep.report; print(*({unwanted} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
