"""Where a pack stands at its last evaluation boundary: the run and the step of each slot, and torch's random stream.

Together with the checkpoints of those steps this is all that a killed pack needs to resume with the same bits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lorasweep.disk import write_atomically


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """One slot of a pack."""

    folder_name: str
    """Name of its run's folder."""
    step: int
    """Optimizer steps done. At 0 the run has no checkpoint."""


@dataclass(frozen=True, kw_only=True)
class PackState:
    """A pack at a boundary."""

    slots: tuple[SlotState, ...]
    """In slot order."""
    shared_stream: str
    """State of torch's own random stream, as `read_shared_stream` gives it."""


def write_pack_state(path: Path, state: PackState) -> None:
    """Writes a pack's state whole or not at all."""
    write_atomically(path, json.dumps(asdict(state)) + "\n")


def read_pack_state(path: Path) -> PackState | None:
    """Returns a pack's state; None where there is none or the file is damaged."""
    try:
        content = json.loads(path.read_text())
        return PackState(**{**content, "slots": tuple(SlotState(**slot) for slot in content["slots"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_shared_stream(device: torch.device) -> str:
    """Returns the state of torch's own random stream on the CPU, and after it that on a GPU, as hex digits."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return "".join(state.numpy().tobytes().hex() for state in states)


def restore_shared_stream(stream: str, device: torch.device) -> None:
    """Sets torch's own random stream to a state that `read_shared_stream` gave on a device of the same kind."""
    content = torch.frombuffer(bytearray.fromhex(stream), dtype=torch.uint8)
    size = len(torch.get_rng_state())
    torch.set_rng_state(content[:size].clone())
    if device.type == "cuda" and len(content) > size:
        torch.cuda.set_rng_state(content[size:].clone(), device)
