"""A sweep's studies are in a journal that no killed process blocks or damages, or in a database that answers."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError
from tests.fuzzing import FUZZ, damage_bytes, refusal_allowed
from tests.servers.postgres import PASSWORD, USER

import lorasweep
from lorasweep.config.sweep import StorageConfig
from lorasweep.errors import ConfigError, RecordError, WorkerError
from lorasweep.record import read_sweep
from lorasweep.sweep.controller.lifecycle import load_study, reopen_sweep
from lorasweep.sweep.controller.storage import JOURNAL_FILE, close_storage, open_storage, open_study

JOURNAL = StorageConfig(url=None)
SOURCE = str(Path(lorasweep.__file__).parent.parent)


def add_trials(folder, number):
    study = open_study(open_storage(JOURNAL, folder), "lora", direction="minimize", metric="loss")
    for _ in range(number):
        study.add_trial(optuna.create_trial(value=1.0))


def count_trials(folder):
    study = open_study(open_storage(JOURNAL, folder), "lora", direction="minimize", metric="loss")
    return len(study.get_trials())


def test_what_is_written_is_there_when_the_journal_is_opened_again(tmp_path):
    add_trials(tmp_path, 2)
    assert count_trials(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL_FILE]  # no lock is left beside it


@pytest.mark.parametrize("torn", ['{"op_code":5,"worker_id":"x","tri', "{", '{"op_code": 4, "\udcff'])
def test_a_line_that_was_left_unfinished_is_cut_off_before_the_next_is_written(tmp_path, torn):
    add_trials(tmp_path, 1)
    journal = tmp_path / JOURNAL_FILE
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn.encode(errors="surrogateescape"))
    open_storage(JOURNAL, tmp_path)
    assert journal.read_bytes() == whole
    add_trials(tmp_path, 1)
    assert count_trials(tmp_path) == 2


def test_a_lock_of_optunas_that_a_killed_process_left_blocks_nobody(tmp_path):
    add_trials(tmp_path, 1)
    (tmp_path / f"{JOURNAL_FILE}.lock").write_text("")
    assert count_trials(tmp_path) == 1


@pytest.mark.slow
def test_a_process_killed_while_it_writes_loses_nothing_that_it_had_written(tmp_path):
    code = (
        "import os, signal\nfrom pathlib import Path\nimport optuna\n"
        "from lorasweep.config.sweep import StorageConfig\n"
        "from lorasweep.sweep.controller.storage import open_storage, open_study\n"
        f"storage = open_storage(StorageConfig(url=None), Path({str(tmp_path)!r}))\n"
        "study = open_study(storage, 'lora', direction='minimize', metric='loss')\n"
        "study.add_trial(optuna.create_trial(value=1.0))\n"
        f"open({str(tmp_path / JOURNAL_FILE)!r}, 'a').write('{{')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": SOURCE}, timeout=240)
    assert killed.returncode == -signal.SIGKILL
    assert count_trials(tmp_path) == 1


def test_a_study_that_is_there_is_opened_with_its_direction(tmp_path):
    storage = open_storage(JOURNAL, tmp_path)
    made = open_study(storage, "one/lora", direction="maximize", metric="f1")
    made.set_user_attr("key", 3)
    again = open_study(open_storage(JOURNAL, tmp_path), "one/lora", direction="maximize", metric="f1")
    assert again.direction == optuna.study.StudyDirection.MAXIMIZE
    assert (again.user_attrs, again.metric_names) == ({"key": 3}, ["f1"])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "`storage.url` must be a database that answers"),
        ("nosuchdb://host/name", "but 'nosuchdb://host/name' is not"),
        ("sqlite:////no/such/folder/studies.db", "unable to open database file"),
        ("postgresql+psycopg://127.0.0.1:1/studies?connect_timeout=2", "'postgresql+psycopg://127.0.0.1:1/studies"),
        ("postgresql://127.0.0.1:no/studies", "but 'postgresql://127.0.0.1:no/studies' is not"),
    ],
)
def test_a_database_that_does_not_answer_is_one_sentence_with_what_to_do(tmp_path, url, said):
    with pytest.raises(ConfigError) as refused:
        open_storage(StorageConfig(url=url), tmp_path)
    assert said in str(refused.value)
    assert "remove the key" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def in_database(three_arms, tmp_path):
    """A sweep whose studies are in a database."""
    three_arms["settings"]["storage.url"] = f"sqlite:///{tmp_path / 'studies.db'}"
    return three_arms


def rows_of(path):
    return [(row.arm, row.number, row.params, row.state, row.value) for row in read_sweep(path).trials]


def test_a_sweep_in_a_database_is_the_sweep_of_a_journal(begin, work, finish, runs, in_database):
    stored = begin(in_database, folder="stored")
    assert not work(stored, stop_at=9)
    finish(stored.path, stop_at=9)
    assert not (stored.path / JOURNAL_FILE).exists()
    whole = begin(in_database | {"settings": in_database["settings"] | {"storage.url": None}}, folder="whole")
    assert work(whole)
    assert rows_of(stored.path) == rows_of(whole.path)


@pytest.fixture
def in_postgres(three_arms, postgres, monkeypatch):
    """A sweep whose studies are in PostgreSQL; its client gets the password from the environment."""
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    server = postgres.server
    three_arms["settings"]["storage.url"] = f"postgresql+psycopg://127.0.0.1:{server.port}/{postgres.name}?user={USER}"
    return three_arms


@pytest.mark.slow
@pytest.mark.parametrize("pack_size", [1, 3])
def test_a_sweep_in_postgresql_is_resumed_and_leaves_its_trials_there(
    begin, work, runs, packs, in_postgres, postgres, pack_size
):
    how = f"worker.pack_size={pack_size}"
    stored = begin(in_postgres, how, folder="stored")
    assert not work(stored, stop_at=9)
    begun = int(postgres.query("SELECT count(*) FROM trials")[0][0])
    assert 0 < begun < 10
    assert work(reopen_sweep(stored.path))
    assert not (stored.path / JOURNAL_FILE).exists()
    assert postgres.query("SELECT state, count(*) FROM trials GROUP BY state") == [["COMPLETE", "10"]]
    names = [name for (name,) in postgres.query("SELECT study_name FROM studies ORDER BY study_id")]
    assert names == [f"{stored.record.study_prefix}{arm}" for arm in ("frozen", "full", "lora")]
    whole = begin(in_postgres | {"settings": in_postgres["settings"] | {"storage.url": None}}, how, folder="whole")
    assert work(whole)
    assert rows_of(stored.path) == rows_of(whole.path)
    for path in stored.path.rglob("*"):
        assert path.is_dir() or PASSWORD.encode() not in path.read_bytes()


@pytest.mark.slow
def test_a_postgresql_that_crashes_in_the_middle_ends_the_sweep_with_a_sentence_and_it_goes_on_later(
    begin, work, runs, in_postgres, postgres
):
    folder = begin(in_postgres)
    true_score = runs.score

    def crash(config, step):
        if config.method.name == "lora" and step == 4:
            postgres.server.stop(immediately=True)
        return true_score(config, step)

    runs.score = crash
    with pytest.raises(WorkerError, match=f"type `lorasweep sweep --resume {folder.path}`") as said:
        work(folder)
    assert "\n" not in str(said.value)
    with pytest.raises(ConfigError, match=r"`storage.url` must be a database that answers") as refused:
        reopen_sweep(folder.path)
    assert "\n" not in str(refused.value)
    postgres.server.start()
    runs.score = true_score
    assert work(reopen_sweep(folder.path))
    assert postgres.query("SELECT state, count(*) FROM trials GROUP BY state") == [["COMPLETE", "10"]]


@pytest.mark.slow
def test_a_wrong_password_of_postgresql_is_one_sentence_that_does_not_say_it(begin, in_postgres, monkeypatch, tmp_path):
    monkeypatch.setenv("PGPASSWORD", "wrong-one")
    with pytest.raises(ConfigError, match="password authentication failed") as refused:
        begin(in_postgres)
    assert "wrong-one" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_two_sweeps_of_one_name_share_a_database(begin, work, runs, in_database):
    first, second = begin(in_database, folder="a"), begin(in_database, folder="b")
    assert first.record.study_prefix != second.record.study_prefix
    assert work(first)
    assert work(second)
    assert rows_of(first.path) == rows_of(second.path)
    assert len(rows_of(first.path)) == 10


def test_a_sweep_whose_database_lost_its_studies_is_refused(begin, work, runs, in_database, tmp_path):
    folder = begin(in_database)
    assert not work(folder, stop_at=9)
    (tmp_path / "studies.db").unlink()
    with pytest.raises(RecordError, match=r"`storage.url=sqlite:.* has none of them"):
        reopen_sweep(folder.path)


def test_a_sweep_whose_database_is_away_is_refused_and_goes_on_once_it_is_back(
    begin, work, runs, in_database, tmp_path
):
    folder = begin(in_database)
    assert not work(folder, stop_at=9)
    (tmp_path / "studies.db").rename(tmp_path / "away")
    (tmp_path / "studies.db").mkdir()
    with pytest.raises(ConfigError, match=r"`storage.url` must be a database that answers"):
        reopen_sweep(folder.path)
    (tmp_path / "studies.db").rmdir()
    (tmp_path / "away").rename(tmp_path / "studies.db")
    assert work(reopen_sweep(folder.path))


def test_a_sweep_that_can_not_be_begun_leaves_no_record(begin, in_database, tmp_path):
    in_database["settings"]["storage.url"] = "sqlite:////no/such/folder/studies.db"
    with pytest.raises(ConfigError, match=r"`storage.url` must be"):
        begin(in_database)
    assert not (tmp_path / "sweep").exists()
    begin(in_database | {"settings": in_database["settings"] | {"storage.url": None}}).close()  # it is not locked


@pytest.mark.parametrize("content", [b"{nonsense\n", b"\x00\xff\n"])
def test_a_damaged_journal_is_refused(begin, work, runs, three_arms, content):
    folder = begin(three_arms)
    assert not work(folder, stop_at=6)
    journal = folder.path / JOURNAL_FILE
    journal.write_bytes(content + journal.read_bytes())
    with pytest.raises(RecordError, match=r"journal.log' .* is damaged"):
        reopen_sweep(folder.path)


def test_a_journal_of_nothing_is_refused(begin, work, runs, three_arms):
    folder = begin(three_arms)
    assert not work(folder, stop_at=6)
    (folder.path / JOURNAL_FILE).write_text("")
    with pytest.raises(RecordError, match=r"journal.log' must have the studies .* has none of them"):
        reopen_sweep(folder.path)


def test_a_database_that_is_read_only_is_refused(begin, work, runs, in_database, tmp_path):
    first = begin(in_database, folder="first")  # makes the tables
    first.close()
    in_database["settings"]["storage.url"] = f"sqlite:///file:{tmp_path / 'studies.db'}?mode=ro&uri=true"
    with pytest.raises(ConfigError, match="attempt to write a readonly database") as refused:
        begin(in_database, folder="second")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "second" / "sweep.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "error", "pack_size"),
    [
        ("set_trial_intermediate_value", OperationalError("SELECT 1", {}, Exception("gone")), 3),
        ("set_trial_state_values", StorageInternalError("commit"), 1),
    ],
)
def test_a_database_that_dies_in_the_middle_ends_the_sweep_and_blames_no_trial(
    begin, work, runs, packs, in_database, monkeypatch, write, error, pack_size
):
    folder = begin(in_database, f"worker.pack_size={pack_size}")
    true_write, calls = getattr(folder.storage, write), []

    def die(*arguments, **named):
        calls.append(write)
        if len(calls) > 3:
            raise error
        return true_write(*arguments, **named)

    monkeypatch.setattr(folder.storage, write, die)
    with pytest.raises(WorkerError, match="database of a sweep must answer") as said:
        work(folder)
    assert f"`lorasweep sweep --resume {folder.path}`" in str(said.value)
    assert "\n" not in str(said.value)
    assert work(reopen_sweep(folder.path))
    assert {row.state for row in read_sweep(folder.path).trials} == {"complete"}
    assert len(rows_of(folder.path)) == 10


@pytest.mark.parametrize("missing", [slice(0, 1), slice(3, 4), slice(5, 12)])
def test_a_journal_without_some_of_its_lines_is_refused(begin, work, runs, three_arms, missing):
    folder = begin(three_arms)
    assert not work(folder, stop_at=6)
    journal = folder.path / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    del lines[missing]
    journal.write_bytes(b"".join(lines))
    with pytest.raises(RecordError, match=rf"journal.log' .* is damaged: its line {missing.start + 1} is missing"):
        reopen_sweep(folder.path)


def test_a_journal_with_lines_of_another_program_is_read(tmp_path):
    add_trials(tmp_path, 1)
    theirs = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL_FILE))  # it also ignores our numbers
    )
    optuna.load_study(study_name="lora", storage=theirs).add_trial(optuna.create_trial(value=2.0))
    add_trials(tmp_path, 1)
    assert count_trials(tmp_path) == 3


def test_a_changed_line_of_a_journal_is_refused_also_for_reading(begin, work, runs, three_arms):
    folder = begin(three_arms)
    assert not work(folder, stop_at=6)
    assert load_study(folder.path, "full").trials
    journal = folder.path / JOURNAL_FILE
    content = journal.read_bytes()
    assert b'"values":[0.' in content
    journal.write_bytes(content.replace(b'"values":[0.', b'"values":[1.', 1))
    for read in (reopen_sweep, functools.partial(load_study, arm="full")):
        with pytest.raises(RecordError, match=r"journal.log' .* is damaged: its line \d+ was changed"):
            read(folder.path)


def test_a_journal_whose_end_was_cut_off_is_refused(begin, work, runs, three_arms):
    folder = begin(three_arms)
    assert not work(folder, stop_at=6)
    journal = folder.path / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    first = next(index for index, line in enumerate(lines) if b'"values"' in line or b'"op_code":4' in line)
    journal.write_bytes(b"".join(lines[:first]))
    with pytest.raises(RecordError, match=r"must have the \d trials of `\w+` in sweep.json, but has 0"):
        reopen_sweep(folder.path)


@pytest.fixture(scope="module")
def whole_journal(tmp_path_factory):
    """The content of a journal of three trials with all kinds of values."""
    folder = tmp_path_factory.mktemp("journal")
    study = open_study(open_storage(JOURNAL, folder), "lora", direction="minimize", metric="loss")
    for number in range(3):
        study.add_trial(
            optuna.create_trial(
                params={"optim.lr": 0.1 * number},
                distributions={"optim.lr": optuna.distributions.FloatDistribution(0, 1)},
                intermediate_values={1: 0.5, 2: float("inf")},
                user_attrs={"größe": [None, "x"]},
                value=0.1234 + number,
            )
        )
    study.set_user_attr("done", value=True)
    return (folder / JOURNAL_FILE).read_bytes()


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_damaged_journal_is_never_read_as_another(tmp_path, whole_journal, data):
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, whole_journal.rindex(b"\n", 0, -1))] * 2)))
    cut = whole_journal[:start] + whole_journal[end:]
    content = data.draw(st.one_of(st.just(cut), damage_bytes(whole_journal)))
    (tmp_path / "other").mkdir(exist_ok=True)
    (tmp_path / JOURNAL_FILE).write_bytes(content)
    with refusal_allowed(unchanged=tmp_path / "other", error=RecordError):
        close_storage(open_storage(JOURNAL, tmp_path))
        # Only a line without an end, which a killed process left, may lack.
        assert whole_journal.startswith((tmp_path / JOURNAL_FILE).read_bytes())
