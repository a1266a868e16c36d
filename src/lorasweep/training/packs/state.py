"""The state file of a pack: the run and the step of each slot at the last boundary, and torch's global random stream.

Together with the checkpoints of those steps it is all that a killed pack needs to resume with the same bits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lorasweep.disk import write_atomically


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """One slot: the name of the run's folder, and the optimizer steps done (0: the run has no checkpoint)."""

    folder_name: str
    step: int


@dataclass(frozen=True, kw_only=True)
class PackState:
    """A pack at a boundary: its slots in order, and the random stream as `read_shared_stream` returns it."""

    slots: tuple[SlotState, ...]
    shared_stream: str


def write_pack_state(path: Path, state: PackState) -> None:
    write_atomically(path, json.dumps(asdict(state)) + "\n")


def read_pack_state(path: Path) -> PackState | None:
    """Returns None if the file is missing or damaged: the runs then resume one by one."""
    try:
        content = json.loads(path.read_text())
        return PackState(**{**content, "slots": tuple(SlotState(**slot) for slot in content["slots"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_shared_stream(device: torch.device) -> str:
    """Returns the state of torch's global random stream on the CPU, and then on the GPU if used, as hex digits."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return "".join(state.numpy().tobytes().hex() for state in states)


def restore_shared_stream(stream: str, device: torch.device) -> None:
    """Sets torch's global random stream to a state that `read_shared_stream` returned for the same kind of device."""
    content = torch.frombuffer(bytearray.fromhex(stream), dtype=torch.uint8)
    size = len(torch.get_rng_state())
    torch.set_rng_state(content[:size].clone())
    if device.type == "cuda" and len(content) > size:
        torch.cuda.set_rng_state(content[size:].clone(), device)
