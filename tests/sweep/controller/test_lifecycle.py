"""A sweep's folder is resumed as it was left or not at all, by one process at a time, and its loss is noticed."""

import errno
import json
from pathlib import Path

import optuna
import pytest
from tests.files import read_files

from lorasweep.disk import is_running
from lorasweep.errors import ConfigError, RecordError, WorkerError
from lorasweep.record import JOURNAL_FILE, read_sweep
from lorasweep.sweep.controller.folder import open_storage
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
    with pytest.raises(RecordError, match="lorasweep status"):
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
    runs.values = {moved / "runs" / path.name: values for path, values in runs.values.items()}
    monkeypatch.chdir(moved.parent)
    folder = reopen_sweep(Path("moved"))
    assert folder.path == Path("moved")
    folder.close()
    assert work(reopen_sweep(moved))
    assert len(read_sweep(moved).trials) == 10


def cut_off(journal):
    """Returns a journal without its first trial, and what follows it."""
    lines = journal.splitlines(keepends=True)
    return b"".join(lines[: next(number for number, line in enumerate(lines) if b'"op_code":4' in line)])


def replace_in_record(**changes):
    return lambda text: json.dumps(json.loads(text) | changes).encode()


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("../made_up.yaml", lambda text: text + b"\n", ConfigError, r"made_up.yaml' has changed. Restore it"),
        (JOURNAL_FILE, None, RecordError, "journal.log"),
        (JOURNAL_FILE, lambda text: b"{nonsense\n" + text, RecordError, "journal.log' .* damaged.*Restore it"),
        (JOURNAL_FILE, lambda text: b"\x00\xff\n" + text, RecordError, "journal.log' .* damaged.*Restore it"),
        (JOURNAL_FILE, cut_off, RecordError, r"the \d trials of `\w+` in sweep.json, but has 0.*Restore it"),
        ("sweep.json", replace_in_record(definition={}), RecordError, "`definition` in .*Restore it"),
        ("sweep.json", replace_in_record(definition={"file": {}}), RecordError, "`definition` in .*Restore it"),
        ("sweep.json", replace_in_record(arms=[]), RecordError, "arms: .* at least 1 .*Restore the file"),
    ],
)
def test_a_sweep_with_a_changed_file_is_refused_and_stays_as_it_is(stopped, name, change, error, said):
    path = stopped / name
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(content))
    before = read_files(stopped)
    with pytest.raises(error, match=said):
        reopen_sweep(stopped)
    assert read_files(stopped) == before
    path.write_bytes(content)
    reopen_sweep(stopped).close()


@pytest.mark.parametrize("torn", [b'{"op_code":5,"worker_id":"x","tri', b'{"op_code": 4, "\xff'])
def test_what_a_killed_process_left_of_a_write_to_the_journal_is_removed(tmp_path, torn):
    def add_trial():
        study = optuna.create_study(storage=open_storage(tmp_path), study_name="lora", load_if_exists=True)
        study.add_trial(optuna.create_trial(value=1.0))
        return len(study.trials)

    add_trial()
    journal = tmp_path / JOURNAL_FILE
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    (tmp_path / f"{JOURNAL_FILE}.lock").touch()
    open_storage(tmp_path)
    assert journal.read_bytes() == whole
    assert add_trial() == 2


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


def test_a_controller_in_another_process_keeps_the_warnings_of_the_record(begin, three_arms):
    created = begin(three_arms)
    created.warn("of the data, before the start")
    created.save()
    created.close()
    opened = reopen_sweep(created.path)
    opened.close()
    assert opened.record.warnings == ["of the data, before the start"]


@pytest.mark.parametrize("becomes", ["moved", "replaced"])
def test_a_folder_that_was_moved_is_not_written_to(folder, tmp_path, becomes):
    folder.path.rename(tmp_path / "moved")
    if becomes == "replaced":
        (folder.path / "runs").mkdir(parents=True)
    for write in (lambda: folder.save(), lambda: folder.open_study("other")):
        with pytest.raises(FileNotFoundError):
            write()
    assert not (folder.path / "sweep.json").exists()
    assert not (folder.path / JOURNAL_FILE).exists()


@pytest.mark.parametrize("where", ["run", "journal", "record"])
def test_a_disk_that_is_full_ends_the_sweep_and_its_trials_go_on_later(
    begin, work, runs, three_arms, monkeypatch, where
):
    opened, true_score = begin(three_arms), runs.score

    def fill(*arguments, **others):
        raise OSError(errno.ENOSPC, "No space left on device")

    def score(config, step):
        if config.method.name == "lora" and step == 4:
            if where == "run":
                fill()
            target = "lorasweep.sweep.controller.folder.write_record" if where == "record" else "os.fsync"
            patch.setattr(target, fill)
        return true_score(config, step)

    runs.score = score
    with monkeypatch.context() as patch, pytest.raises(WorkerError, match=f"`lorasweep sweep --resume {opened.path}`"):
        work(opened)
    runs.score = true_score
    assert work(reopen_sweep(opened.path))
    assert {row.state for row in read_sweep(opened.path).trials} == {"complete"}
