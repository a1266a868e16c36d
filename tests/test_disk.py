"""What is written is there whole or not at all, and what the system refuses is told from a run's own errors."""

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorasweep.disk import claim_folder, explain_os_error, lock_run, numbered_folders, write_atomically
from lorasweep.errors import ConfigError, RecordError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_content_and_name_reach_the_disk_before_a_write_returns(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    write_atomically(tmp_path / "file", "x")
    temporary, folder = (os.path.basename(name) for name in flushed)
    assert re.fullmatch(rf"\.file\.{os.getpid()}-[0-9a-f]{{8}}\.tmp", temporary)
    assert folder == tmp_path.name


def test_a_full_disk_is_known_by_its_number_its_words_and_as_a_cause(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = RuntimeError("could not write")
    wrapped.__cause__ = full
    rust = ValueError('I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }')
    for error in (full, wrapped, rust):
        assert explain_os_error(error) == "No space left on device"
    assert explain_os_error(RuntimeError("shapes differ")) is None
    ours = ConfigError("`data.train` must name a file")
    ours.__cause__ = full
    assert explain_os_error(ours) is None  # it says more
    assert list(tmp_path.iterdir()) == []


def test_claims_at_the_same_time_get_different_folders(tmp_path):
    def claim(_):
        with claim_folder(None, otherwise=numbered_folders(tmp_path / "outputs" / "run"), key="output") as path:
            return path.name

    with ThreadPoolExecutor(8) as pool:  # locks and new folders are of one open file, so threads compete as processes
        claimed = list(pool.map(claim, range(100)))
    assert set(claimed) == {"run", *(f"run-{number}" for number in range(2, 101))}


def test_a_locked_run_is_refused_until_its_owner_ends(tmp_path):
    with lock_run(tmp_path), pytest.raises(RecordError, match=r"another one has .* open"), lock_run(tmp_path):
        raise AssertionError("it was locked twice")
    with lock_run(tmp_path) as path:
        assert path == tmp_path
    assert list(tmp_path.iterdir()) == []


def refuse_to_claim(path, message):
    with pytest.raises(ConfigError, match=message), claim_folder(path, otherwise=(), key="output"):
        raise AssertionError("it was claimed")


def test_an_empty_folder_is_claimed_and_a_full_one_is_refused(tmp_path):
    with claim_folder(tmp_path, otherwise=(), key="output") as path:
        (path / "mine.txt").write_text("mine")
    refuse_to_claim(tmp_path, "`output` must be a new or empty folder")
    refuse_to_claim(tmp_path / "mine.txt" / "run", "`output` must be a folder that can be created")


@pytest.mark.parametrize("is_written", [False, True])
def test_an_error_removes_a_claimed_folder_if_nothing_was_written(tmp_path, is_written):
    path = tmp_path / "outputs" / "run"

    def fail():
        with claim_folder(None, otherwise=numbered_folders(path), key="output") as claimed:
            if is_written:
                (claimed / "run.json").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (path / "run.json").exists() == is_written
    assert (tmp_path / "outputs").exists() == is_written
