"""A sweep's folder is taken up as it was left or not at all, by one process at a time."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from lorasweep.errors import ConfigError, RecordError, WorkerError
from lorasweep.record import read_sweep
from lorasweep.sweep import new_folder, reopen_sweep


def contents(folder):
    """Every file below a folder and its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stopped(begin, work, runs, content):
    """The folder of a sweep that was stopped after a few trials."""
    folder = begin(content)
    assert not work(folder, stop_at=8)
    return folder.path


def test_a_new_sweep_has_a_record_of_what_was_asked_for(begin, content, tmp_path):
    folder = begin(content, "arms.lora.trials=2")
    folder.close()
    record = read_sweep(tmp_path / "sweep")
    assert (record.status, record.name, record.description) == ("running", "made_up", "three arms")
    assert (record.metric, record.direction) == ("bits_per_byte", "minimize")
    assert record.source == str(tmp_path / "made_up.yaml")
    assert [(arm.name, arm.method, arm.trials) for arm in record.arms] == [
        ("frozen", "frozen", 1),
        ("full", "full", 3),
        ("lora", "lora", 2),
    ]
    assert record.arms[2].space == {
        "method.rank": [1, 2, 4],
        "optim.lr": {"low": 1e-3, "high": 1e-1, "log": True},
    }
    assert record.arms[2].pruner == "none"


def test_new_folders_are_numbered_below_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(new_folder("s", None)) == "outputs/s"
    (tmp_path / "outputs" / "s").mkdir(parents=True)
    (tmp_path / "outputs" / "s-2").mkdir()
    assert str(new_folder("s", None)) == "outputs/s-3"


def test_a_wanted_folder_may_be_new_or_empty(tmp_path):
    assert new_folder("s", str(tmp_path / "new")) == tmp_path / "new"
    assert new_folder("s", str(tmp_path)) == tmp_path


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_wanted_folder_that_is_not_empty_is_refused(tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    wanted = tmp_path if kind == "folder" else tmp_path / "file"
    with pytest.raises(
        ConfigError, match=r"`sweep.output` must be a new or empty folder, .* `lorasweep sweep --resume"
    ):
        new_folder("s", str(wanted))


def test_a_stopped_sweep_is_taken_up_with_its_trials(stopped):
    before = read_sweep(stopped)
    folder = reopen_sweep(stopped)
    try:
        assert folder.record == before
        assert sum(len(study.get_trials()) for study in folder.studies.values()) == len(before.trials) > 0
        assert folder.makespan_before_s == before.makespan_s > 0
    finally:
        folder.close()


def test_a_sweep_that_another_process_has_open_is_refused(stopped):
    folder = reopen_sweep(stopped)
    with pytest.raises(
        WorkerError,
        match=r"a sweep is taken up when no worker runs it, but another process has .* open. Wait for it, .* join",
    ):
        reopen_sweep(stopped)
    folder.close()
    reopen_sweep(stopped).close()


def edit(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def rename_arm(raw):
    arms = raw["definition"]["file"]["arms"]
    arms["other"] = arms.pop("lora")


def widen_range(raw):
    raw["definition"]["file"]["arms"]["full"]["space"]["optim.lr"]["high"] = 0.5


def add_trials(raw):
    raw["definition"]["file"]["arms"]["lora"]["trials"] = 60


def add_override(raw):
    raw["definition"]["overrides"]["optim.eps"] = 1e-6


@pytest.mark.parametrize("change", [rename_arm, widen_range, add_trials, add_override])
def test_an_edited_definition_is_refused_and_nothing_changes(stopped, change):
    edit(stopped / "sweep.json", change)
    before = contents(stopped)
    with pytest.raises(
        ConfigError, match=r"`definition` in '.*sweep.json' must be as it was when the sweep began, but"
    ):
        reopen_sweep(stopped)
    assert contents(stopped) == before


def test_a_definition_that_does_not_compose_is_refused(stopped):
    edit(stopped / "sweep.json", lambda raw: raw["definition"]["file"]["settings"].update({"optim.lrr": 1}))
    with pytest.raises(ConfigError, match=r"`optim.lrr` is not a setting"):
        reopen_sweep(stopped)


@pytest.mark.parametrize("definition", [{}, {"file": {}}, {"file": {"name": "x"}, "overrides": 3}, []])
def test_a_damaged_definition_is_refused(stopped, definition):
    edit(stopped / "sweep.json", lambda raw: raw.update(definition=definition))
    with pytest.raises(
        (RecordError, ConfigError), match=r"sweep.json' must be (what the sweep was made from|a mapping)|`arms` must"
    ):
        reopen_sweep(stopped)


@pytest.mark.parametrize("change", [lambda text: text + "\n", lambda text: text.replace("trials: 6", "trials: 9")])
def test_a_changed_sweep_file_is_refused_and_nothing_changes(stopped, tmp_path, change):
    source = tmp_path / "made_up.yaml"
    source.write_text(change(source.read_text()))
    before = contents(stopped)
    with pytest.raises(
        ConfigError, match=r"the sweep file must be as it was when .* began, but '.*made_up.yaml' has ch"
    ):
        reopen_sweep(stopped)
    assert contents(stopped) == before


def test_a_deleted_sweep_file_does_not_matter(stopped, tmp_path):
    (tmp_path / "made_up.yaml").unlink()
    reopen_sweep(stopped).close()


def test_a_folder_that_is_no_sweep_is_refused_and_nothing_changes(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecordError, match=r"a sweep's folder must contain sweep.json, but .* does not."):
        reopen_sweep(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_sweep_without_its_journal_is_refused_and_nothing_changes(stopped):
    (stopped / "journal.log").unlink()
    before = contents(stopped)
    with pytest.raises(RecordError, match=r"a sweep's folder must contain journal.log, but .* does not."):
        reopen_sweep(stopped)
    assert contents(stopped) == before


def test_a_damaged_journal_is_refused(stopped):
    journal = stopped / "journal.log"
    journal.write_text("{nonsense\n" + journal.read_text())
    with pytest.raises(RecordError, match=r"journal.log' must be Optuna's journal, but is damaged."):
        reopen_sweep(stopped)


def test_a_refused_sweep_is_not_left_locked(stopped):
    raw = (stopped / "sweep.json").read_text()
    edit(stopped / "sweep.json", add_trials)
    with pytest.raises(ConfigError, match="has changed"):
        reopen_sweep(stopped)
    (stopped / "sweep.json").write_text(raw)
    reopen_sweep(stopped).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_refused(stopped):
    (stopped / ".lock").unlink()
    stopped.chmod(0o500)
    with pytest.raises(RecordError, match="a sweep's folder must be writable"):
        reopen_sweep(stopped)


def test_saving_lists_each_trial_with_its_run(stopped):
    record = read_sweep(stopped)
    states = {(row.arm, row.number): row.state for row in record.trials}
    assert states["frozen", 0] == "complete"
    assert "running" in states.values()
    for row in record.trials:
        assert row.run == f"runs/{row.arm}-{row.number:04d}"
        assert (row.value is None) == (row.state == "running")
        assert set(row.params) == set(next(arm for arm in record.arms if arm.name == row.arm).space)
    assert record.status == "interrupted"


def test_records_of_rows_have_only_json(stopped):
    raw = json.loads((stopped / "sweep.json").read_text())
    assert [dataclasses.asdict(row) for row in read_sweep(stopped).trials] == raw["trials"]
