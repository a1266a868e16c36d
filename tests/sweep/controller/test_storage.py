"""A sweep's studies are in a journal that no killed process blocks or damages."""

import optuna
import pytest

from lorasweep.errors import RecordError
from lorasweep.sweep.controller.folder import JOURNAL_FILE, open_storage
from lorasweep.sweep.controller.lifecycle import reopen_sweep


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


def test_a_journal_whose_end_was_cut_off_is_refused(begin, work, runs, three_arms):
    folder = begin(three_arms)
    assert not work(folder, stop_at=6)
    journal = folder.path / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    first = next(index for index, line in enumerate(lines) if b'"values"' in line or b'"op_code":4' in line)
    journal.write_bytes(b"".join(lines[:first]))
    with pytest.raises(RecordError, match=r"must have the \d trials of `\w+` in sweep.json, but has 0"):
        reopen_sweep(folder.path)
