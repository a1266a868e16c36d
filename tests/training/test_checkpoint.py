"""A damaged checkpoint is noticed, never opened, and the one before it is used; a pack's state file likewise."""

import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch

from lorasweep.disk import explain_unwritable
from lorasweep.record import compute_sha256
from lorasweep.training.checkpoint import (
    FoundCheckpoint,
    PackState,
    find_checkpoint,
    read_pack_state,
    read_rng_state,
    remove_checkpoints,
    remove_older_checkpoints,
    restore_rng_state,
    save_checkpoint,
    write_pack_state,
    write_tensors,
)

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    """A run's folder with checkpoints of steps 2, 4 and 6."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    return tmp_path


def save(folder, step, kind="last"):
    save_checkpoint(folder, kind=kind, step=step, save=partial(write_tensors, {"w": torch.full((9,), step)}))


def newest(folder):
    return max(folder.glob("last-*.ckpt"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def test_the_last_two_are_kept_each_named_by_its_checksum(run):
    remove_older_checkpoints(run, kind="last")
    paths = sorted(run.glob("*.ckpt"))
    assert [path.name.split("-")[1] for path in paths] == ["00000004", "00000006"]
    for path in paths:
        assert path.stem.split("-")[2] == compute_sha256(path)
    found = find_checkpoint(run, kind="last")
    assert (found.path, found.step, found.notes) == (paths[1], 6, [])
    assert torch.equal(found.state["w"], torch.full((9,), 6))


@pytest.mark.parametrize("damage", [cut, flip_a_bit, replace_by_pipe])
def test_of_a_damaged_one_the_one_before_is_used_and_a_note_says_so(run, damage):
    damage(newest(run))
    found = find_checkpoint(run, kind="last")
    assert found.step == 4
    is_noted = any("step 6 was damaged or missing" in note for note in found.notes)
    assert is_noted is (damage is not replace_by_pipe)  # which is not opened
    for path in filter(Path.is_file, run.glob("*.ckpt")):
        cut(path)
    assert find_checkpoint(run, kind="last").path is None


@pytest.mark.parametrize("step", [6, 4, 0])
def test_the_checkpoint_of_a_step_is_found_whatever_came_after_it(run, step):
    assert find_checkpoint(run, kind="last", step=step).step == step
    if step == 4:
        next(run.glob("last-00000004-*.ckpt")).unlink()
        found = find_checkpoint(run, kind="last", step=4)
        assert (found.step, len(found.notes)) == (2, 1)


def test_only_checkpoints_after_a_step_are_removed(run):
    save(run, 4, kind="slot")
    (run / "last-mine.ckpt").write_text("mine")
    remove_checkpoints(run, after_step=2)
    assert sorted(path.name[:13] for path in run.glob("*.ckpt")) == ["last-00000002", "last-mine.ckp"]
    assert find_checkpoint(run, kind="slot") == FoundCheckpoint()


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


def test_a_write_that_fails_leaves_the_ones_before(run):
    before = {path.name for path in run.iterdir()}

    def fail(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(run, kind="last", step=8, save=fail)
    assert {path.name for path in run.iterdir()} == before


def test_a_state_of_a_pack_is_read_as_it_was_written_or_not_at_all(tmp_path):
    path = tmp_path / "pack.json"
    assert read_pack_state(path) is None
    state = PackState(steps={"lora-0001": 20, "lora-0000": 0}, rng_state=read_rng_state(CPU))
    write_pack_state(path, state)
    read = read_pack_state(path)
    assert read == state
    assert list(read.steps) == list(state.steps)  # in slot order
    cut(path)
    assert read_pack_state(path) is None
    path.write_text('{"slots": {}, "rng_state": ""}')
    assert read_pack_state(path) is None


def test_a_stream_continues_where_it_was_read():
    torch.manual_seed(3)
    torch.rand(7)
    stream = read_rng_state(CPU)
    expected = torch.rand(5)
    torch.manual_seed(4)
    restore_rng_state(stream, CPU)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_checkpoint_on_a_full_disk_fails_with_the_reason(tmp_path):
    with pytest.raises((OSError, RuntimeError)) as caught:
        write_tensors({"w": torch.zeros(100_000)}, Path("/dev/full"))
    assert explain_unwritable(tmp_path, caught.value) == "No space left on device"
