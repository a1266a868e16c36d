"""What TensorBoard reads: rows of the HParams tab, the best curves of a sweep's arms, and the answers."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lorasweep.record import read_run
from lorasweep.report import write_report
from lorasweep.report.write import ARM_TAG, HPARAMS_FOLDER, TENSORBOARD_FOLDER, write_run_hparams


@pytest.fixture
def board(confirmed):
    """The TensorBoard folder of a confirmed sweep's report."""
    write_report(confirmed)
    return confirmed / "report" / TENSORBOARD_FOLDER


def load(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def row_of(folder):
    """Returns the name, the settings and the metrics of a row in HParams."""
    events = load(folder)
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    settings = {key: getattr(value, str(value.WhichOneof("kind"))) for key, value in start.hparams.items()}
    return start.group_name, settings, {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def test_row_has_numbers_as_numbers_and_the_rest_as_text(sweep):
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


def test_each_trial_has_a_row_and_the_best_curves_of_all_arms_are_one_chart(board):
    rows = [row_of(folder) for folder in (board / "trials").iterdir()]
    assert len(rows) == 25
    assert {settings["status"] for _, settings, _ in rows} == {"complete", "stopped", "failed"}
    assert "lora-0000 of quickstart" in {name for name, _, _ in rows}
    assert sorted(str(row[1]["arm"]) for row in rows if "test/bits_per_byte" in row[2]) == ["frozen", "full", "lora"]
    tag = f"{ARM_TAG}/bits_per_byte"
    curves = {arm: load(board / "arms" / arm).Scalars(tag) for arm in ("frozen", "full", "lora")}
    assert [point.step for point in curves["lora"]] == [0, 25, 50, 75, 100, 125, 150]
    assert [point.step for point in curves["frozen"]] == [0, 150]
    assert len({point.value for point in curves["frozen"]}) == 1
