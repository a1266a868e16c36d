"""Checkpoints, from which runs and packs resume. Each is one file, which is replaced atomically.

A run outside of packs has Lightning's checkpoint. A pack has one file with the states of all its runs, from which it
resumes exactly, bit for bit. If a pack breaks up, `split_pack` gives each run its part as a file in the run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection

from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError, first_line

RUN_CHECKPOINT = "last.ckpt"
"""File in a run's folder with Lightning's checkpoint."""
SLOT_CHECKPOINT = "slot.ckpt"
"""File in the folder of a run whose pack broke up. The run resumes from it in another pack."""


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file. Lightning holds it twice in memory before, and renames it at the end.

    `write_atomically` renames the file of a run already.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_tensors(checkpoint, Path(path))


def write_tensors(state: Mapping[str, Any], path: Path) -> None:
    """Writes a nested state with tensors, without a copy of the whole in memory."""
    with path.open("wb") as file:  # given a path, torch raises no OSError if the disk is full
        torch.save(state, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint; empty if there is no file. Raises RecordError if the file is damaged."""
    if not path.exists():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many classes
        raise RecordError(
            f"{str(path)!r} must be a checkpoint that lorasweep wrote, but can't be read: {first_line(error)}. Remove "
            "it to train from the first step."
        ) from error
    return state


def get_step(state: Mapping[str, Any]) -> int:
    """Returns the optimizer steps that a run had done at its checkpoint; 0 without a checkpoint."""
    return int(state.get("global_step", 0))  # Lightning's name


def remove_checkpoints(folder: Path) -> None:
    """Removes the checkpoints in a run's folder."""
    for name in (RUN_CHECKPOINT, SLOT_CHECKPOINT):
        (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class PackCheckpoint:
    """The state of a pack after an evaluation, or before its first step."""

    runs: Mapping[str, Mapping[str, Any]]
    """The state of each run, by the name of its folder, in slot order. A run that has done no step has none."""
    rng_state: str
    """State of torch's global random number generators as hex digits."""


def write_pack(path: Path, checkpoint: PackCheckpoint) -> None:
    write_atomically(path, partial(write_tensors, vars(checkpoint)))


def read_pack(path: Path) -> PackCheckpoint | None:
    """Returns the checkpoint of a pack; None if there is no file. Raises RecordError if the file is damaged."""
    state = read_checkpoint(path)
    return PackCheckpoint(**state) if state else None


def split_pack(path: Path, *, runs: Path) -> None:
    """Removes a pack's checkpoint, if there is one, after its runs got their states. `runs` has the runs' folders."""
    if (checkpoint := read_pack(path)) is None:
        return
    for name, state in checkpoint.runs.items():
        if state:
            # the tensors are parts of larger ones, which torch would save whole
            own = apply_to_collection(state, torch.Tensor, torch.clone)
            write_atomically(runs / name / SLOT_CHECKPOINT, partial(write_tensors, own))
    path.unlink()


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
