"""A sweep's studies are in a journal that no killed process blocks or damages."""

import functools

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzzing import FUZZ, damage_bytes, refusal_allowed

from lorasweep.errors import RecordError
from lorasweep.sweep.controller.lifecycle import load_study, reopen_sweep
from lorasweep.sweep.controller.storage import JOURNAL_FILE, open_storage


def add_trials(folder, number):
    study = optuna.create_study(storage=open_storage(folder), study_name="lora", load_if_exists=True)
    for _ in range(number):
        study.add_trial(optuna.create_trial(value=1.0))


def count_trials(folder):
    study = optuna.create_study(storage=open_storage(folder), study_name="lora", load_if_exists=True)
    return len(study.get_trials())


@pytest.mark.parametrize("torn", ['{"op_code":5,"worker_id":"x","tri', "{", '{"op_code": 4, "\udcff'])
def test_a_line_that_was_left_unfinished_is_cut_off_before_the_next_is_written(tmp_path, torn):
    add_trials(tmp_path, 1)
    journal = tmp_path / JOURNAL_FILE
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn.encode(errors="surrogateescape"))
    open_storage(tmp_path)
    assert journal.read_bytes() == whole
    add_trials(tmp_path, 1)
    assert count_trials(tmp_path) == 2


@pytest.mark.parametrize("content", [b"{nonsense\n", b"\x00\xff\n"])
def test_a_damaged_journal_is_refused(begin, work, runs, three_arms, content):
    folder = begin(three_arms)
    assert not work(folder, stop_at=6)
    journal = folder.path / JOURNAL_FILE
    journal.write_bytes(content + journal.read_bytes())
    with pytest.raises(RecordError, match=r"journal.log' .* is damaged"):
        reopen_sweep(folder.path)


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
    study = optuna.create_study(storage=open_storage(folder), study_name="lora", load_if_exists=True)
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
        open_storage(tmp_path).journal.close()
        # Only a line without an end, which a killed process left, may lack.
        assert whole_journal.startswith((tmp_path / JOURNAL_FILE).read_bytes())
