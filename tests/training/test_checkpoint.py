"""A checkpoint is the old or the new one, a damaged one is refused and runs no code, and a pack's is split."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from lorasweep.disk import explain_os_error
from lorasweep.errors import RecordError
from lorasweep.training.checkpoint import (
    _save,
    get_step,
    read_checkpoint,
    split_checkpoint,
    write_checkpoint,
)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_runs_no_code(tmp_path):
    for write in (lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=2)), torch.save):
        write(Trap(f"touch {tmp_path / 'ran'}"), tmp_path / "last.ckpt")
        with pytest.raises(RecordError, match="must be a checkpoint that lorasweep wrote"):
            read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_is_cut_short_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "last.ckpt"
    assert read_checkpoint(path) == {}
    write_checkpoint({"runs": ["run"], "ends": {}, "w": torch.ones(9), "global_step": 4}, path)
    assert get_step(read_checkpoint(path)) == 4
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match=r"Remove it to train from the first step"):
        read_checkpoint(path)


def test_a_pack_that_breaks_up_leaves_each_part_its_runs_alone(tmp_path):
    whole, left, right = (tmp_path / name for name in ("whole.ckpt", "b/left.ckpt", "right.ckpt"))
    split_checkpoint(whole, {left: ["a"]})
    assert not left.exists()  # nor was the whole
    write_checkpoint({"runs": ["a", "b"], "ends": {}}, whole)
    split_checkpoint(whole, {whole: ["b"]})
    assert read_checkpoint(whole) == {"runs": ["b"], "ends": {}}  # before the first step there is no more
    weights = {f"slots.{slot}.layer.{slot}.lora_a": torch.full((90_000,), 1.0 * slot) for slot in range(3)}
    moments = [{"mean": weight + 1} for weight in weights.values()]
    state = {"runs": ["a", "b", "c"], "ends": {"ended": ["stopped", "poor"]}, "global_step": 2}
    state |= {"progress": [0, 1, 2], "state_dict": weights, "optimizer_states": [{"slots": moments}]}
    write_checkpoint(state, whole)
    split_checkpoint(whole, {left: ["c", "a"], right: ["b", "ended"]})
    assert not whole.exists()
    for path, names, slots in ((left, ["c", "a"], [2, 0]), (right, ["b"], [1])):
        assert path.stat().st_size < 1.1 * len(slots) * 2 * 90_000 * 4
        found = read_checkpoint(path)
        assert (found["runs"], found["progress"], get_step(found)) == (names, slots, 2)
        assert found["ends"] == (state["ends"] if path == right else {})
        for place, slot in enumerate(slots):
            assert (found["state_dict"][f"slots.{place}.layer.{slot}.lora_a"] == slot).all()
            assert (found["optimizer_states"][0]["slots"][place]["mean"] == slot + 1).all()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_a_checkpoint_on_a_full_disk_fails_with_the_reason():
    # not `write_checkpoint`, which replaces its file by a rename: as root it would replace the device
    with pytest.raises((OSError, RuntimeError)) as caught:
        _save({"w": torch.zeros(100_000)}, Path("/dev/full"))
    assert explain_os_error(caught.value) == "No space left on device"
