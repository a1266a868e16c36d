"""The file from which a pack resumes is read as it was written, or not at all."""

from __future__ import annotations

import json

import pytest
import torch

from lorasweep.training.packs.state import (
    PackState,
    SlotState,
    read_pack_state,
    read_rng_state,
    restore_rng_state,
    write_pack_state,
)

CPU = torch.device("cpu")


@pytest.fixture
def state():
    slots = (SlotState(folder_name="lora-0001", step=20), SlotState(folder_name="lora-0000", step=0))
    return PackState(slots=slots, rng_state=read_rng_state(CPU))


def test_a_state_is_read_as_it_was_written(state, tmp_path):
    write_pack_state(tmp_path / "pack.json", state)
    assert read_pack_state(tmp_path / "pack.json") == state
    assert [path.name for path in tmp_path.iterdir()] == ["pack.json"]


def test_no_file_is_no_state(tmp_path):
    assert read_pack_state(tmp_path / "pack.json") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: json.dumps({"slots": [{}], "rng_state": ""}),
    ],
)
def test_a_damaged_file_is_no_state(state, tmp_path, damage):
    path = tmp_path / "pack.json"
    write_pack_state(path, state)
    path.write_text(damage(path.read_text()))
    assert read_pack_state(path) is None


def test_a_stream_continues_where_it_was_read():
    torch.manual_seed(3)
    torch.rand(7)
    stream = read_rng_state(CPU)
    expected = torch.rand(5), torch.randn(3)
    torch.manual_seed(4)
    restore_rng_state(stream, CPU)
    assert torch.equal(torch.rand(5), expected[0])
    assert torch.equal(torch.randn(3), expected[1])
