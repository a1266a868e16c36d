"""A sweep's folder is resumed as it was left or not at all, by one process at a time, and its loss is noticed."""

import errno
import json
from pathlib import Path

import pytest
from tests.files import read_files
from tests.sweep.controller.conftest import Simulation

from lorasweep.disk import is_running
from lorasweep.errors import ConfigError, RecordError, WorkerError
from lorasweep.record import read_sweep
from lorasweep.sweep.controller.controller import Controller
from lorasweep.sweep.controller.lifecycle import reopen_sweep


@pytest.fixture
def stopped(begin, work, runs, three_arms):
    folder = begin(three_arms)
    assert not work(folder, stop_at=8)
    return folder.path


def test_a_sweep_that_another_process_has_open_is_refused(stopped):
    folder = reopen_sweep(stopped)
    assert is_running(stopped)
    before = read_files(stopped)
    with pytest.raises(RecordError, match=r"another one has .* open.*lorasweep status"):
        reopen_sweep(stopped)
    assert read_files(stopped) == before
    folder.close()
    assert not is_running(stopped)
    reopen_sweep(stopped).close()
    (stopped / ".lock").unlink()
    assert not is_running(stopped)
    assert not (stopped / ".lock").exists()  # to look makes none


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


def test_a_changed_file_and_a_missing_journal_are_refused_and_nothing_changes(stopped, tmp_path):
    source, before = tmp_path / "made_up.yaml", read_files(stopped)
    text = source.read_text()
    for changed in (text + "\n", text.replace("trials: 6", "trials: 9")):
        source.write_text(changed)
        with pytest.raises(ConfigError, match=r"'.*made_up.yaml' has changed. Restore it"):
            reopen_sweep(stopped)
    assert read_files(stopped) == before
    source.write_text(text)
    (stopped / "journal.log").unlink()
    del before["journal.log"]
    with pytest.raises(RecordError, match=r"must contain journal.log"):
        reopen_sweep(stopped)
    assert read_files(stopped) == before


@pytest.mark.parametrize(("key", "value"), [("definition", {}), ("definition", {"file": {}}), ("arms", [])])
def test_a_record_without_its_definition_or_arms_is_refused(stopped, key, value):
    record = stopped / "sweep.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {key: value}))
    with pytest.raises(RecordError, match=f"`{key}` in .*sweep.json' must"):
        reopen_sweep(stopped)


@pytest.fixture
def folder(begin, three_arms):
    opened = begin(three_arms)
    yield opened
    opened.close()


def test_time_of_all_sessions_is_added_and_time_in_between_is_not(stopped, work, runs):
    first = read_sweep(stopped)
    reopened = reopen_sweep(stopped)
    reopened.opened_s -= 1000  # as if it had been open for so long
    assert not work(reopened, stop_at=1)
    second = read_sweep(stopped)
    assert 1000 <= second.makespan_s - first.makespan_s < 1500
    assert second.telemetry["wall_s"] > first.telemetry["wall_s"]


@pytest.mark.parametrize("becomes", ["moved", "replaced"])
def test_a_folder_that_was_moved_is_not_written_to(folder, tmp_path, becomes):
    folder.path.rename(tmp_path / "moved")
    if becomes == "replaced":
        (folder.path / "runs").mkdir(parents=True)
        (folder.path / ".lock").touch()
    with pytest.raises(WorkerError, match=r"but .* can't be written to: it was moved or removed. No finished run"):
        folder.save(usage={})
    assert not (folder.path / "sweep.json").exists()


def test_a_sweep_whose_journal_was_removed_does_not_end_as_complete(begin, content):
    controller = Controller(begin(content))
    Simulation(controller).run()
    assert controller.is_over()
    path = controller.sweep.path
    (path / "journal.log").unlink()
    with pytest.raises(WorkerError, match=r"journal\.log"):
        controller.finish()
    assert read_sweep(path).status == "running"
    controller.sweep.close()


def test_a_full_disk_is_no_trials_fault(folder):
    with pytest.raises(WorkerError, match=r"can't be written to: No space left on device"):
        folder.check_disk(RuntimeError("No space left on device"))
    with pytest.raises(WorkerError, match=r"can't be written to: No space left on device"):
        folder.check_disk(OSError(errno.ENOSPC, "No space left on device"))
    folder.check_disk(RuntimeError("shapes differ"))
    folder.check_disk()


def test_a_disk_that_is_full_when_a_trial_ends_ends_the_sweep_and_the_trial_goes_on_later(
    begin, work, runs, three_arms, monkeypatch
):
    opened = begin(three_arms)
    true_score = runs.score

    def fill(config, step):
        if config.method.name == "lora" and step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return true_score(config, step)

    runs.score = fill
    with pytest.raises(WorkerError, match=f"type `lorasweep sweep --resume {opened.path}`"):
        work(opened)
    runs.score = true_score
    assert work(reopen_sweep(opened.path))
    assert {row.state for row in read_sweep(opened.path).trials} == {"complete"}
