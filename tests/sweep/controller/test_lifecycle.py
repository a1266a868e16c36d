"""A sweep's folder is taken up as it was left or not at all, by one process at a time."""

import json
from pathlib import Path

import pytest

from lorasweep.disk import is_running
from lorasweep.errors import ConfigError, RecordError
from lorasweep.record import read_sweep
from lorasweep.sweep.controller.lifecycle import reopen_sweep


def contents(folder):
    """Every file below a folder and its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stopped(begin, work, runs, three_arms):
    """The folder of a sweep that was stopped after a few trials."""
    folder = begin(three_arms)
    assert not work(folder, stop_at=8)
    return folder.path


def test_a_stopped_sweep_is_taken_up_with_its_trials(stopped):
    before = read_sweep(stopped)
    folder = reopen_sweep(stopped)
    try:
        assert folder.record == before
        studies = [folder.open_study(arm.name) for arm in folder.definition.arms]
        assert sum(len(study.get_trials()) for study in studies) == len(before.trials) > 0
        assert folder.makespan_before_s == before.makespan_s > 0
        assert folder.telemetry_before == before.telemetry
        assert before.telemetry["wall_s"] > 0
    finally:
        folder.close()


def test_a_sweep_that_another_process_has_open_is_refused(stopped):
    folder = reopen_sweep(stopped)
    assert is_running(stopped)
    before = contents(stopped)
    with pytest.raises(RecordError, match=r"another one has .* open.*lorasweep status"):
        reopen_sweep(stopped)
    assert contents(stopped) == before
    folder.close()
    assert not is_running(stopped)
    reopen_sweep(stopped).close()


def test_a_sweep_can_be_resumed_in_another_folder_and_from_another_one(stopped, work, runs, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    stopped.rename(moved)
    runs.steps_done = {moved / "runs" / path.name: step for path, step in runs.steps_done.items()}
    runs.values = {moved / "runs" / path.name: values for path, values in runs.values.items()}
    monkeypatch.chdir(moved.parent)
    folder = reopen_sweep(Path("moved"))
    assert folder.path == Path("moved")
    folder.close()
    assert work(reopen_sweep(moved))
    assert len(read_sweep(moved).trials) == 10


def test_a_running_sweep_says_so_and_looking_at_one_that_is_not_makes_no_lock(stopped, tmp_path):
    assert not is_running(stopped)
    assert not is_running(tmp_path / "nowhere")
    (stopped / ".lock").unlink()
    assert not is_running(stopped)
    assert not (stopped / ".lock").exists()


@pytest.mark.parametrize("change", [lambda text: text + "\n", lambda text: text.replace("trials: 6", "trials: 9")])
def test_a_changed_sweep_file_is_refused_and_nothing_changes(stopped, tmp_path, change):
    source = tmp_path / "made_up.yaml"
    source.write_text(change(source.read_text()))
    before = contents(stopped)
    with pytest.raises(ConfigError, match=r"'.*made_up.yaml' has changed. Restore it"):
        reopen_sweep(stopped)
    assert contents(stopped) == before


def test_a_sweep_without_its_journal_is_refused_and_nothing_changes(stopped):
    (stopped / "journal.log").unlink()
    before = contents(stopped)
    with pytest.raises(RecordError, match=r"must contain journal.log"):
        reopen_sweep(stopped)
    assert contents(stopped) == before


@pytest.mark.parametrize(("key", "value"), [("definition", {}), ("definition", {"file": {}}), ("arms", [])])
def test_a_record_without_its_definition_or_arms_is_refused(stopped, key, value):
    record = stopped / "sweep.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {key: value}))
    with pytest.raises(RecordError, match=f"`{key}` in .*sweep.json' must"):
        reopen_sweep(stopped)
