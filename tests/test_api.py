"""The Python API runs, resumes and reads sweeps and runs, and raises what the command line would say."""

import re
import shutil
from pathlib import Path

import pandas
import pytest
from tests.small_runs import SMALL_RUN

import lorasweep
from lorasweep.api import find_run
from lorasweep.errors import ConfigError, RecordError, SweepInterrupted
from lorasweep.record import read_sweep, write_record
from lorasweep.sweep.session import Session

SWEEP = {
    "name": "small",
    "settings": SMALL_RUN | {"sampler": "random", "confirm.seeds": 1},
    "arms": {
        "frozen": {"settings": {"method": "frozen"}},
        "lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 2]}, "trials": 2},
    },
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A sweep given as a mapping, which was run in silence."""
    return lorasweep.run_sweep(SWEEP, output=tmp_path_factory.mktemp("sweep") / "out", progress=None)


def test_a_sweep_from_a_mapping_is_complete_and_its_best_trial_is_confirmed(result):
    assert (result.status, result.metric, result.direction) == ("complete", "bits_per_byte", "minimize")
    assert result.arms == ["frozen", "lora"]
    assert result.report.is_file()
    best, frame = result.best("lora"), result.trials_dataframe().query("arm == 'lora'")
    assert sorted(frame["trial"]) == [0, 1]
    assert best.number == frame.loc[frame["bits_per_byte"].idxmin(), "trial"]
    assert set(result.confirm_dataframe().query("subject == 'lora'")["method.rank"]) == {best.params["method.rank"]}
    assert [row.trial for row in result.record.settings if row.subject == "lora"] == [best.number]
    assert best.search_score == result.study("lora").trials[best.number].value == result.load_run(best).score
    assert result.best("frozen").params == {}
    for call in (result.best, result.study):
        with pytest.raises(ConfigError, match=r"`arm` must be one of frozen, lora.*'full'"):
            call("full")


def test_without_an_arm_the_best_of_all_is_given_and_a_run_is_found_by_all_that_names_it(result):
    assert result.best() in (result.best("frozen"), result.best("lora"))
    assert result.best().search_score == min(result.best(arm).search_score for arm in result.arms)
    assert result.best_params == result.best().params
    folder = result.folder / result.best("lora").run
    assert result.load_run(result.best("lora")).folder == result.load_run(folder).folder == folder
    setting = result.recommended("lora")
    assert result.load_run(setting).folder == find_run(result.folder / "lora")[0]  # that of `export`
    assert result.folder / setting.run.run == result.load_run(setting).folder
    assert result.load_run(setting).config["method"]["rank"] == setting.params["method.rank"]
    with pytest.raises(ConfigError, match=r"must be the folder of a run.*Call `result.load_run"):
        lorasweep.load_run(setting)


def test_a_result_prints_its_answers_in_a_line_each(result):
    first, *answers = repr(result).splitlines()
    assert str(result.folder) in first
    assert [answer.partition("?")[1] for answer in answers] == ["?", "?", "?"]


def test_the_recommended_model_has_an_adapter_or_is_merged(result):
    def list_names(**given):
        return {name for name, _ in result.load_model("lora", **given).named_parameters()}

    assert any("lora_a" in name for name in list_names())
    assert not any("lora_a" in name for name in list_names(merged=True))


def test_a_split_has_the_sweeps_own_rows_and_no_others(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"text {n},{'good' if n % 2 else 'bad'}\n" for n in range(60)))
    classifier = {"model": "classifier", "model.path": "embedded:tiny", "data": "table", "data.train": str(file)}
    settings = {**classifier, "trainer.max_steps": 2, "trainer.progress": False, "confirm.seeds": 0}
    arms = {"frozen": {"settings": {"method": "frozen"}}}
    result = lorasweep.run_sweep({"settings": settings, "arms": arms}, output=tmp_path / "out", progress=None)
    frames = {name: result.split(name) for name in ("train", "validation", "test")}
    assert sorted(text for frame in frames.values() for text in frame["text"]) == sorted(f"text {n}" for n in range(60))
    assert len(frames["test"]) > len(frames["validation"])  # a fifth of few rows
    assert set(frames["test"]["label"]) == {"good", "bad"}
    with pytest.raises(ConfigError, match="`name` must be one of train, validation, test"):
        result.split("tests")
    file.write_text(file.read_text().replace("text 1,", "text one,"))
    (name,) = [name for name, frame in frames.items() if "text 1" in set(frame["text"])]
    with pytest.raises(RecordError, match="must be as they were"):
        result.split(name)


def test_an_unfinished_sweep_of_the_same_name_is_named_instead_of_a_second_one(result, here, monkeypatch, capsys):
    shutil.copytree(result.folder, here / "outputs" / "small")
    monkeypatch.setattr(Session, "train", lambda self, opened, *, progress: opened.close())
    with pytest.raises(SweepInterrupted):
        lorasweep.run_sweep(SWEEP)
    said = capsys.readouterr().err
    assert "outputs/small is complete: `lorasweep compare outputs/small`" in said
    assert "goes to outputs/small-2" in said
    with pytest.raises(ConfigError, match=r"'outputs/small-2' is interrupted.*--resume outputs/small-2.*`--new`"):
        lorasweep.run_sweep(SWEEP, progress=None)
    with pytest.raises(SweepInterrupted):
        lorasweep.run_sweep(SWEEP, progress=None, new=True)


def test_dataframes_have_a_row_per_trial_run_and_step(result):
    trials, confirmed = result.trials_dataframe(), result.confirm_dataframe()
    assert list(trials["arm"]) == ["frozen", "lora", "lora"]
    assert sorted(trials["method.rank"].dropna()) == [1, 2]
    assert confirmed["test/bits_per_byte"].notna().all()
    steps = result.load_run(result.best("lora")).steps_dataframe()
    assert list(steps.index) == [1, 2, 3, 4]
    assert list(steps["validation/bits_per_byte"].dropna().index) == [2, 4]
    assert steps["loss"].notna().all()


def test_figures_table_and_weights_are_there_and_loading_reads_what_running_returned(result):
    assert all(figure.data for figure in result.figures().values())
    assert "bits per byte" in result.table()
    facts = r"<p .*>Runs of 4 steps \(.* epochs of .* training examples\), in fp32 on cpu\.</p>"
    assert re.search(facts, result.report.read_text())
    assert str(result.load_run(result.best("lora"))).startswith("complete: bits_per_byte ")
    names = {name for name, _ in result.load_run(result.best("lora")).load_model().named_parameters()}
    assert any("lora_a" in name for name in names)
    again = lorasweep.load_sweep(result.folder)
    pandas.testing.assert_frame_equal(again.trials_dataframe(), result.trials_dataframe())


def test_a_complete_sweep_that_is_resumed_without_changes_stays_as_it_is(result, capsys):
    before = (result.folder / "sweep.json").read_bytes()
    result.report.unlink()
    assert lorasweep.resume_sweep(result.folder).report.exists()
    assert (result.folder / "sweep.json").read_bytes() == before
    assert "is complete. `sweep.trials=NUMBER`" in capsys.readouterr().err


def test_a_resumed_sweep_gets_its_seeds_and_tells_its_progress(result):
    seen = []
    resumed = lorasweep.resume_sweep(result.folder, overrides=["confirm.seeds=2"], progress=seen.append)
    assert list(resumed.confirm_dataframe()["arm"]) == ["frozen", "lora", "lora"]  # the base needs one seed
    assert seen[-1].record.status == "complete"


def test_changes_are_in_the_record_before_anything_trains(result, monkeypatch, tmp_path):
    """Because the controller of `worker=ray` is another process, which reads them from the record."""
    seen = []

    def look(self, opened, *, progress):
        opened.close()
        seen.append(read_sweep(opened.path))
        return False

    monkeypatch.setattr(Session, "train", look)
    folder = Path(shutil.copytree(result.folder, tmp_path / "copy"))
    with pytest.raises(SweepInterrupted, match=r"lorasweep.resume_sweep\(") as interrupt:
        lorasweep.resume_sweep(folder, overrides={"confirm.seeds": 3, "arms.lora.trials": 3}, progress=None)
    assert isinstance(interrupt.value, KeyboardInterrupt)  # a script ends
    (record,) = seen
    assert (record.status, len(record.confirm_seeds), record.arms[1].trials) == ("interrupted", 3, 3)


def test_a_resumed_sweep_keeps_the_warnings_of_workers_and_drops_those_that_a_change_has_mended(
    result, monkeypatch, tmp_path
):
    folder = Path(shutil.copytree(result.folder, tmp_path / "copy"))
    record = read_sweep(folder)
    assert any("`confirm.seeds` is" in warning for warning in record.warnings)
    record.warnings.append("A pack broke.")
    write_record(record, folder)
    monkeypatch.setattr(Session, "train", lambda self, opened, *, progress: opened.close())
    with pytest.raises(SweepInterrupted):
        lorasweep.resume_sweep(folder, overrides={"confirm.seeds": 3}, progress=None)
    warnings = read_sweep(folder).warnings
    assert "A pack broke." in warnings
    assert not any("`confirm.seeds` is" in warning for warning in warnings)


def test_what_minutes_cut_is_said_in_the_report_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "train", lambda self, opened, *, progress: opened.close())
    with pytest.raises(SweepInterrupted):
        lorasweep.run_sweep(SWEEP, minutes=60, output=tmp_path / "sweep", progress=None)
    assert read_sweep(tmp_path / "sweep").notes[0].startswith("To end within 60 min: ")


def test_a_measurement_that_takes_all_minutes_and_long_ends_with_one_sentence(monkeypatch):
    with pytest.raises(ConfigError, match="`--minutes` must be at least 1 for"):
        lorasweep.plan_sweep(SWEEP, minutes=1e-4)
    monkeypatch.setattr("lorasweep.sweep.session.MIN_MEASURING_S", 0.0)
    with pytest.raises(ConfigError, match="measuring a few steps alone took"):
        lorasweep.plan_sweep(SWEEP, minutes=1e-4, measure=True)


def test_overrides_as_words_and_as_a_mapping_are_the_same_run(tmp_path):
    words = [f"{key}={value}" for key, value in SMALL_RUN.items()]
    first = lorasweep.train_run([*words, "method.rank=2"], output=tmp_path / "words")
    second = lorasweep.train_run({**SMALL_RUN, "method.rank": 2}, output=tmp_path / "mapping")
    assert first.score == second.score
    assert first.config == second.config
    assert lorasweep.load_run(tmp_path / "words").record == first.record
    again = lorasweep.train_run({**SMALL_RUN, "method.rank": 2}, output=tmp_path / "mapping", resume=True)
    assert again.record.ended_at == second.record.ended_at


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda path: lorasweep.run_sweep("quickstrat"), ConfigError, "quickstart"),
        (lambda path: lorasweep.run_sweep({"name": "x"}), ConfigError, "`arms`"),
        (lambda path: lorasweep.run_sweep({**SWEEP, "name": object()}), ConfigError, "YAML"),
        (lambda path: lorasweep.load_sweep(path), RecordError, "a sweep's folder must exist"),
        (lambda path: lorasweep.load_run(path), RecordError, "a run's folder must exist"),
    ],
)
def test_a_wrong_request_is_an_exception_and_leaves_nothing(here, call, error, words):
    with pytest.raises(error) as raised:
        call(here / "new")
    assert words in str(raised.value)
    assert not list(here.iterdir())
