"""A checkpoint is the old or the new one, a damaged one is refused and runs no code, and a pack's is split."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from lorasweep.disk import explain_os_error
from lorasweep.errors import RecordError
from lorasweep.training.checkpoint import (
    PackCheckpoint,
    get_step,
    read_checkpoint,
    read_pack,
    split_pack,
    write_pack,
    write_tensors,
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
    write_tensors({"w": torch.ones(9), "global_step": 4}, path)
    assert get_step(read_checkpoint(path)) == 4
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match=r"Remove it to train from the first step"):
        read_checkpoint(path)


def test_a_pack_that_breaks_up_leaves_each_run_its_part(tmp_path):
    path, both = tmp_path / "pack.ckpt", torch.arange(200_000.0)
    assert read_pack(path) is None
    states = {f"lora-000{n}": {"global_step": 2, "trained": {"w": part}} for n, part in enumerate(both.chunk(2))}
    write_pack(path, PackCheckpoint(runs=states | {"lora-0002": {}}, rng_state=""))
    assert list(read_pack(path).runs) == ["lora-0000", "lora-0001", "lora-0002"]  # in slot order
    for name in states:
        (tmp_path / name).mkdir()
    split_pack(path, runs=tmp_path)
    assert not path.exists()
    for name, state in states.items():
        kept = tmp_path / name / "slot.ckpt"
        assert torch.equal(read_checkpoint(kept)["trained"]["w"], state["trained"]["w"])
        assert kept.stat().st_size < 1.1 * state["trained"]["w"].nbytes  # without the other run's part


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_checkpoint_on_a_full_disk_fails_with_the_reason():
    with pytest.raises((OSError, RuntimeError)) as caught:
        write_tensors({"w": torch.zeros(100_000)}, Path("/dev/full"))
    assert explain_os_error(caught.value) == "No space left on device"
