"""Writes and finds the last two checkpoints of a run. The file name has the step and the SHA-256 of the content.

A file whose content does not match its name is damaged. The run then resumes from the checkpoint before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorasweep.disk import move_into_place, temporary_name
from lorasweep.record import compute_sha256

CheckpointKind = Literal["last", "slot"]
"""`last`: Lightning's checkpoint of a run outside of packs. `slot`: the checkpoint of a run in a pack."""
NUM_KEPT_CHECKPOINTS = 2
_FILE_NAME = re.compile(r"(last|slot)-(\d{8})-([0-9a-f]{64})\.ckpt")
_CONTENT: Mapping[CheckpointKind, Mapping[str, type]] = {
    "last": {
        "state_dict": dict,
        "optimizer_states": list,
        "lr_schedulers": list,
        "loops": dict,
        "base": str,
        "progress": dict,
        "method": dict,
        "dropout_streams": list,
    },
    "slot": {"adapter": dict, "optimizer": dict, "progress": dict, "stream": Tensor},
}
"""Keys that a checkpoint of each kind has, and the types of their values."""


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
        if state := _read_state(path, kind):
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
    """Removes all checkpoints of a kind except the last two."""
    for path in _list_newest_first(folder, kind)[NUM_KEPT_CHECKPOINTS:]:
        path.unlink(missing_ok=True)


def _list_newest_first(folder: Path, kind: str) -> list[Path]:
    found = [path for path in folder.glob(f"{kind}-*.ckpt") if _FILE_NAME.fullmatch(path.name) and path.is_file()]
    # a step that was repeated can have two files, because the content is part of the name
    return sorted(found, key=lambda path: (_get_step(path), path.stat().st_mtime_ns), reverse=True)


def _get_step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _read_state(path: Path, kind: CheckpointKind) -> dict[str, Any] | None:
    """Returns the state in a checkpoint; None if it is damaged or not what a run of this kind writes."""
    if compute_sha256(path) != path.stem.split("-")[2]:
        return None
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # another program wrote it under a matching name
        return None
    keys = _CONTENT[kind].items()
    is_whole = isinstance(state, dict) and all(isinstance(state.get(key), type_) for key, type_ in keys)
    return state if is_whole else None
