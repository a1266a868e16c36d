"""The state file of a pack: the run and the step of each slot at the last evaluation, and torch's global RNG state.

A killed pack resumes exactly, bit for bit, from this file and the checkpoints of these steps.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lorasweep.disk import write_atomically


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """The run in a slot."""

    folder_name: str
    """Name of the run's folder."""
    step: int
    """Optimizer steps done. If 0, the run has no checkpoint."""


@dataclass(frozen=True, kw_only=True)
class PackState:
    """The state of a pack after an evaluation, or before its first step."""

    slots: tuple[SlotState, ...]
    rng_state: str
    """State of torch's global random number generators as hex digits."""


def write_pack_state(path: Path, state: PackState) -> None:
    write_atomically(path, json.dumps(asdict(state)) + "\n")


def read_pack_state(path: Path) -> PackState | None:
    """Returns the state in a file; None if the file is missing or damaged. Each run can then resume on its own."""
    try:
        content = json.loads(path.read_text())
        return PackState(**{**content, "slots": tuple(SlotState(**slot) for slot in content["slots"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_rng_state(device: torch.device) -> str:
    """Returns the states of torch's global generators as hex digits: the CPU's, then the GPU's if `device` is one."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return "".join(state.numpy().tobytes().hex() for state in states)


def restore_rng_state(rng_state: str, device: torch.device) -> None:
    """Sets torch's global generators to a state that `read_rng_state` returned on the same kind of device."""
    content = torch.frombuffer(bytearray.fromhex(rng_state), dtype=torch.uint8)
    size = len(torch.get_rng_state())
    torch.set_rng_state(content[:size].clone())
    if device.type == "cuda" and len(content) > size:
        torch.cuda.set_rng_state(content[size:].clone(), device)
