"""What TensorBoard reads: rows of the HParams tab, the best curves of a sweep's arms, and the answers."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tests.files import edit_json

from lorasweep.report.write import ARM_TAG, TENSORBOARD_FOLDER

from .conftest import report


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


def test_each_trial_has_a_row_and_the_best_curves_of_all_arms_are_one_chart(confirmed):
    board = confirmed / "report" / TENSORBOARD_FOLDER
    swept = {"method.rank": 8, "method.targets": ["q_proj", "v_proj"], "flag": True, "seed": None}
    edit_json(confirmed / "sweep.json", lambda raw: raw["trials"][1].update(params=swept))
    for _ in range(2):  # the second report replaces the first
        report(confirmed)
    assert len(list((board / "trials" / "lora-0000").iterdir())) == 1
    name, settings, metrics = row_of(board / "trials" / "lora-0000")
    assert name == "lora-0000 of quickstart"
    # a number stays a number, and the rest is text
    texts = {"arm": "lora", "status": "complete", "method.targets": "['q_proj', 'v_proj']", "flag": "True"}
    assert settings == {"method.rank": 8.0, **texts}
    assert metrics.keys() == {"best/bits_per_byte", "trainable_params", "peak_memory_bytes", "wall_s"}

    rows = [row_of(folder) for folder in (board / "trials").iterdir()]
    assert len(rows) == 25
    assert {settings["status"] for _, settings, _ in rows} == {"complete", "stopped", "failed"}
    assert sorted(str(row[1]["arm"]) for row in rows if "test/bits_per_byte" in row[2]) == ["frozen", "full", "lora"]
    tag = f"{ARM_TAG}/bits_per_byte"
    curves = {arm: load(board / "arms" / arm).Scalars(tag) for arm in ("frozen", "full", "lora")}
    assert [point.step for point in curves["lora"]] == [0, 25, 50, 75, 100, 125, 150]
    assert [point.step for point in curves["frozen"]] == [0, 150]
    assert len({point.value for point in curves["frozen"]}) == 1
