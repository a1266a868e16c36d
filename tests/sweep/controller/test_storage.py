"""A process that is killed while it writes the journal neither blocks nor damages it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import lorasweep.sweep.journal as journal_file
import pytest
from lorasweep.sweep.journal import JournalLock

import lorasweep
from lorasweep.errors import WorkerError
from lorasweep.sweep import reopen_sweep

SOURCE = str(Path(lorasweep.__file__).parent.parent)


@pytest.mark.slow
def test_a_lock_of_a_killed_process_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "journal.log").touch()
    code = (
        "import os, signal; from lorasweep.sweep.journal import JournalLock; "
        "JournalLock('journal.log').acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": SOURCE}, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    lock = JournalLock("journal.log")
    assert lock.acquire()
    lock.release()
    assert os.listdir(tmp_path) == ["journal.log"]


def test_a_lock_that_another_has_is_waited_for(tmp_path):
    path = str(tmp_path / "journal.log")
    (tmp_path / "journal.log").touch()
    first, second = JournalLock(path), JournalLock(path)
    first.acquire()
    got = threading.Event()
    waiting = threading.Thread(target=lambda: (second.acquire(), got.set()), daemon=True)
    waiting.start()
    assert not got.wait(0.3)
    first.release()
    assert got.wait(60)
    second.release()


def test_a_lock_that_is_never_let_go_of_is_waited_for_so_long_and_no_longer(tmp_path, monkeypatch):
    path = tmp_path / "journal.log"
    path.touch()
    monkeypatch.setattr(journal_file, "LONGEST_WAIT_S", 0.2)
    first = JournalLock(str(path))
    first.acquire()
    with pytest.raises(
        WorkerError, match=r"journal.log' must be free within 0 s, but another process keeps it locked."
    ):
        JournalLock(str(path)).acquire()
    first.release()
    JournalLock(str(path)).acquire()


def test_a_journal_that_is_gone_is_not_made_anew(tmp_path):
    with pytest.raises(FileNotFoundError):
        JournalLock(str(tmp_path / "journal.log")).acquire()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_left_unfinished_is_cut_off_before_the_next_is_written(tmp_path):
    path = tmp_path / "journal.log"
    path.write_text('{"a":1}\n{"b":2}\n{"c"')
    lock = JournalLock(str(path))
    lock.acquire()
    lock.release()
    assert path.read_text() == '{"a":1}\n{"b":2}\n'
    path.write_text('{"a"')
    lock.acquire()
    lock.release()
    assert path.read_text() == ""


def test_a_sweep_whose_journal_was_left_unfinished_goes_on(begin, work, runs, content):
    folder = begin(content)
    assert not work(folder, stop_at=6)
    with (folder.path / "journal.log").open("a") as file:
        file.write('{"op_code":5,"worker_id":"x","tri')
    assert work(reopen_sweep(folder.path))
    assert len(reopen_and_count(folder.path)) == 10


def reopen_and_count(path):
    opened = reopen_sweep(path)
    opened.close()
    return opened.record.trials


def test_a_sweep_in_a_relative_folder_is_not_blocked_by_a_stale_lock(begin, work, runs, content, tmp_path, monkeypatch):
    """The file that Optuna's own lock leaves when a process is killed, as sweeps of earlier versions may have it."""
    folder = begin(content)
    assert not work(folder, stop_at=6)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep" / "journal.log.lock").symlink_to("sweep/journal.log")
    assert work(reopen_sweep(Path("sweep")))
