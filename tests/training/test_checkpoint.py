"""A checkpoint that is not what was written is noticed, never opened, and the one before it is used."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzzing import FUZZ, HOSTILE, damage_bytes, refusal_allowed

from lorasweep.record import compute_sha256
from lorasweep.training.checkpoint import (
    FoundCheckpoint,
    find_checkpoint,
    remove_checkpoints,
    remove_older_checkpoints,
    save_checkpoint,
)


@pytest.fixture
def run(tmp_path):
    """A run's folder with checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    return tmp_path


def save(folder: Path, step: int, kind="last") -> None:
    weights = torch.full((100,), float(step))
    state = {"state_dict": {"w": weights}, "optimizer_states": [], "lr_schedulers": [], "loops": {}}
    state |= {"base": "b", "progress": {}, "method": {}, "dropout_streams": []}
    state |= {"adapter": {}, "optimizer": {}, "stream": weights}
    save_checkpoint(folder, kind=kind, step=step, save=lambda path: torch.save(state, path))


def newest(folder: Path) -> Path:
    return max(folder.glob("last-*.ckpt"))


def test_the_last_two_are_kept_each_named_by_its_checksum(run):
    assert len(list(run.glob("*.ckpt"))) == 3
    remove_older_checkpoints(run, kind="last")
    paths = sorted(run.glob("*.ckpt"))
    assert [path.name.split("-")[1] for path in paths] == ["00000004", "00000006"]
    for path in paths:
        assert path.stem.split("-")[2] == compute_sha256(path)
    found = find_checkpoint(run, kind="last")
    assert (found.path, found.step, found.notes) == (paths[1], 6, [])
    assert torch.equal(found.state["state_dict"]["w"], torch.full((100,), 6.0))


def cut(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty])
def test_of_a_damaged_one_the_one_before_is_used_and_a_note_says_so(run, damage):
    damage(newest(run))
    found = find_checkpoint(run, kind="last")
    assert found.step == 4
    assert found.notes == ["The checkpoint of step 6 was damaged or missing, so the run resumed from step 4."]


@pytest.mark.parametrize(("wanted", "found"), [(6, 6), (4, 4), (2, 2), (0, 0)])
def test_the_checkpoint_of_a_step_is_found_whatever_came_after_it(run, wanted, found):
    damaged = newest(run)
    assert find_checkpoint(run, kind="last", step=wanted).step == found
    if wanted < 6:
        cut(damaged)
        assert find_checkpoint(run, kind="last", step=wanted).notes == []


def test_instead_of_the_checkpoint_of_a_step_that_is_gone_the_one_before_is_used_and_a_note_says_so(run):
    next(run.glob("last-00000004-*.ckpt")).unlink()
    found = find_checkpoint(run, kind="last", step=4)
    assert found.step == 2
    assert found.notes == ["The checkpoint of step 4 was damaged or missing, so the run resumed from step 2."]


def test_checkpoints_after_a_step_are_removed(run):
    save(run, 4, kind="slot")
    remove_checkpoints(run, after_step=2)
    assert [path.name[:13] for path in run.glob("*.ckpt")] == ["last-00000002"]


def test_where_all_are_damaged_there_is_nothing_to_go_on_from(run):
    for path in run.glob("*.ckpt"):
        cut(path)
    found = find_checkpoint(run, kind="last")
    assert (found.path, found.step, found.state) == (None, 0, {})
    assert found.notes == ["The checkpoint of step 6, 4, 2 was damaged or missing, so the run resumed from step 0."]


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("write", [lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=2)), torch.save])
def test_a_pickle_with_the_right_checksum_runs_no_code(run, tmp_path_factory, write):
    outside = tmp_path_factory.mktemp("outside")
    save_checkpoint(run, kind="last", step=8, save=lambda path: write(Trap(f"touch {outside / 'ran'}"), path))
    assert find_checkpoint(run, kind="last").step == 6
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("content", [[], {}, 5, "text", None, torch.ones(3), {"state_dict": {}, "loops": []}])
@pytest.mark.parametrize("kind", ["last", "slot"])
def test_tensors_and_plain_values_that_are_no_state_of_a_run_count_as_damaged(tmp_path, kind, content):
    save(tmp_path, 4, kind=kind)
    save_checkpoint(tmp_path, kind=kind, step=6, save=lambda path: torch.save(content, path))
    assert find_checkpoint(tmp_path, kind=kind).step == 4


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02]q\x00."])
def test_a_file_that_torch_can_not_read_counts_as_damaged(run, content):
    save_checkpoint(run, kind="last", step=8, save=lambda path: path.write_bytes(content))
    assert find_checkpoint(run, kind="last").step == 6


def test_a_write_that_fails_leaves_the_ones_before(run, monkeypatch):
    before = {path.name for path in run.iterdir()}

    def fail(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(run, kind="last", step=8, save=fail)
    assert {path.name for path in run.iterdir()} == before


def test_a_checkpoint_of_another_kind_is_not_found(run):
    assert find_checkpoint(run, kind="slot") == FoundCheckpoint()


def test_files_of_other_names_are_left_alone(run):
    (run / "last-mine.ckpt").write_text("mine")
    save(run, 8)
    remove_checkpoints(run)
    assert {path.name for path in run.iterdir()} == {"last-mine.ckpt"}


def test_a_pipe_of_a_checkpoints_name_is_not_opened(run):
    os.mkfifo(run / f"last-00000008-{'0' * 64}.ckpt")
    assert find_checkpoint(run, kind="last").step == 6


KEYS = ["state_dict", "optimizer_states", "lr_schedulers", "loops", "base", "progress", "method", "dropout_streams"]
PLAIN = st.recursive(
    st.one_of(st.sampled_from(HOSTILE), st.just(torch.ones(2)), st.text(max_size=3)),
    lambda values: st.one_of(st.lists(values, max_size=3), st.dictionaries(st.sampled_from(KEYS), values, max_size=3)),
    max_leaves=6,
)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_of_any_content_with_the_right_checksum_the_state_of_a_run_is_found_or_the_one_before(tmp_path, data):
    for path in tmp_path.iterdir():
        path.unlink()
    save(tmp_path, 6)
    whole = newest(tmp_path).read_bytes()
    save(tmp_path, 4)
    newest(tmp_path).unlink()
    content = data.draw(st.one_of(damage_bytes(whole), PLAIN))

    def write(path):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)

    save_checkpoint(tmp_path, kind="last", step=6, save=write)
    with refusal_allowed(unchanged=tmp_path):
        found = find_checkpoint(tmp_path, kind="last")
        assert found.step == 4 or set(KEYS) <= set(found.state)
