"""Checkpoints, from which runs and packs resume.

A run has the last two. A file name has the step and the SHA-256 of the content. A file whose content does not match its
name is damaged; the run then resumes from the checkpoint before. A pack also has a state file: with it and the
checkpoints of its steps, a killed pack resumes exactly, bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lorasweep.disk import move_into_place, temporary_name, write_atomically
from lorasweep.record import compute_sha256

CheckpointKind = Literal["last", "slot"]
"""`last`: Lightning's checkpoint of a run outside of packs. `slot`: the checkpoint of a run in a pack."""
NUM_KEPT_CHECKPOINTS = 2
_FILE_NAME = re.compile(r"(last|slot)-(\d{8})-([0-9a-f]{64})\.ckpt")


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """The checkpoint from which a run resumes."""

    path: Path | None = None
    """None if the run begins at step 0."""
    step: int = 0
    """Optimizer steps done."""
    state: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences on newer checkpoints that are damaged or missing, for the run's record."""


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file. Lightning holds it twice in memory before, and renames it at the end.

    `save_checkpoint` renames the file of a run already.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_tensors(checkpoint, Path(path))


def write_tensors(state: Mapping[str, Any], path: Path) -> None:
    """Writes a nested state with tensors, without a copy of the whole in memory."""
    with path.open("wb") as file:  # given a path, torch raises no OSError if the disk is full
        torch.save(state, file)


def save_checkpoint(folder: Path, *, kind: CheckpointKind, step: int, save: Callable[[Path], None]) -> None:
    """Writes a checkpoint atomically, beside the earlier checkpoints. `save` writes the file to the given path."""
    temporary = temporary_name(folder / f"{kind}.ckpt")
    try:
        save(temporary)
        move_into_place(temporary, folder / f"{kind}-{step:08d}-{compute_sha256(temporary)}.ckpt")
    finally:
        temporary.unlink(missing_ok=True)


def find_checkpoint(folder: Path, *, kind: CheckpointKind, step: int | None = None) -> FoundCheckpoint:
    """Returns the newest checkpoint that is not damaged.

    Args:
        folder: The run's folder.
        kind: Whether the run resumes alone or in a pack.
        step: Ignores checkpoints of later steps. 0 means to begin without a checkpoint. None: no limit.
    """
    paths = [path for path in _list_newest_first(folder, kind) if step is None or _get_step(path) <= step]
    # The caller knows that a checkpoint of `step` was written, so a missing file also counts as damaged.
    damaged = [step] if step and not any(_get_step(path) == step for path in paths) else []
    found = FoundCheckpoint()
    for path in paths:
        with suppress(Exception):  # another program wrote it under a matching name
            if compute_sha256(path) == path.stem.split("-")[2]:
                state = torch.load(path, map_location="cpu", weights_only=True)
                found = FoundCheckpoint(path=path, step=_get_step(path), state=state)
                break
        damaged.append(_get_step(path))
    if damaged:
        steps = ", ".join(map(str, damaged))
        found.notes.append(
            f"The checkpoint of step {steps} was damaged or missing, so the run resumed from step {found.step}."
        )
    return found


def remove_checkpoints(folder: Path, *, after_step: int = -1) -> None:
    """Removes the checkpoints of steps after `after_step`. By default removes all checkpoints."""
    for kind in ("last", "slot"):
        for path in _list_newest_first(folder, kind):
            if _get_step(path) > after_step:
                path.unlink(missing_ok=True)


def remove_older_checkpoints(folder: Path, *, kind: CheckpointKind) -> None:
    for path in _list_newest_first(folder, kind)[NUM_KEPT_CHECKPOINTS:]:
        path.unlink(missing_ok=True)


def _list_newest_first(folder: Path, kind: str) -> list[Path]:
    found = [path for path in folder.glob(f"{kind}-*.ckpt") if _FILE_NAME.fullmatch(path.name) and path.is_file()]
    # a step that was repeated can have two files, because the content is part of the name
    return sorted(found, key=lambda path: (_get_step(path), path.stat().st_mtime_ns), reverse=True)


def _get_step(path: Path) -> int:
    return int(path.name.split("-")[1])


@dataclass(frozen=True, kw_only=True)
class PackState:
    """The state of a pack after an evaluation, or before its first step."""

    steps: Mapping[str, int]
    """Optimizer steps done, by the name of the run's folder, in slot order. After 0 steps a run has no checkpoint."""
    rng_state: str
    """State of torch's global random number generators as hex digits."""


def write_pack_state(path: Path, state: PackState) -> None:
    write_atomically(path, json.dumps(asdict(state)) + "\n")


def read_pack_state(path: Path) -> PackState | None:
    """Returns the state in a file; None if the file is missing or damaged. Each run can then resume on its own."""
    try:
        return PackState(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
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
