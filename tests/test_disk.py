"""What is written is there whole or not at all, and what the system refuses is told from a run's own errors."""

from __future__ import annotations

import errno
import os
import re
from types import SimpleNamespace

import pytest

from lorasweep.disk import explain_unwritable, network_file_system, write_atomically


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


def test_a_write_replaces_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new_folder" / "file"
    write_atomically(path, "old")
    write_atomically(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_content_and_name_reach_the_disk_before_a_write_returns(tmp_path, monkeypatch):
    flushed = []
    true_fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (flushed.append(os.readlink(f"/proc/self/fd/{handle}")), true_fsync(handle))
    )
    write_atomically(tmp_path / "file", "x")
    temporary, folder = (os.path.basename(name) for name in flushed)
    assert re.fullmatch(rf"\.file\.{os.getpid()}-[0-9a-f]{{8}}\.tmp", temporary)
    assert folder == tmp_path.name


def test_a_folder_of_results_that_is_gone_does_not_come_back(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "gone" / "report" / "file", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_by_its_number_its_words_and_as_a_cause(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = RuntimeError("could not write")
    wrapped.__cause__ = full
    rust = ValueError('I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }')
    for error in (full, wrapped, rust):
        assert explain_unwritable(tmp_path, error) == "No space left on device"


def test_a_folder_that_is_gone_is_why(tmp_path):
    assert explain_unwritable(tmp_path / "gone", RuntimeError("x")) == "No such file or directory"


def test_an_error_of_a_runs_own_is_no_matter_of_the_disk(tmp_path):
    assert explain_unwritable(tmp_path, FileNotFoundError(errno.ENOENT, "no such file", "my.csv")) is None
    assert explain_unwritable(tmp_path, RuntimeError("shapes differ")) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "is_network"), [("nfs4", True), ("lustre", True), ("ext4", False), ("tmpfs", False)])
def test_a_network_file_system_is_known_by_its_mount(tmp_path, monkeypatch, kind, is_network):
    (tmp_path / "shared space").mkdir()
    mounts = [("/", "ext4"), (str(tmp_path / "shared space"), "autofs"), (str(tmp_path / "shared space"), kind)]
    parts = [SimpleNamespace(mountpoint=point, fstype=name) for point, name in mounts]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: parts)
    assert network_file_system(tmp_path / "shared space" / "not" / "yet") == (kind if is_network else None)
    assert network_file_system(tmp_path) is None
