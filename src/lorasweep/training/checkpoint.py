"""The last two checkpoints of a run, each named by its step and by the SHA-256 of its content.

A file whose content does not match its name is damaged. It is never loaded: the run resumes from the one before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch

from lorasweep.disk import move_into_place, temporary_name
from lorasweep.record import sha256_of

Kind = Literal["last", "slot"]
"""`last`: Lightning's checkpoint of a run that trains alone. `slot`: of a run in a pack."""
NUM_KEPT = 2
_NAME = re.compile(r"(last|slot)-(\d{8})-([0-9a-f]{64})\.ckpt")


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


def save_checkpoint(folder: Path, *, kind: Kind, step: int, save: Callable[[Path], None]) -> None:
    """Writes a checkpoint whole or not at all, beside the earlier ones. `save` writes the file to a path."""
    temporary = temporary_name(folder / f"{kind}.ckpt")
    try:
        save(temporary)
        move_into_place(temporary, folder / f"{kind}-{step:08d}-{sha256_of(temporary)}.ckpt")
    finally:
        temporary.unlink(missing_ok=True)


def find_checkpoint(folder: Path, *, kind: Kind, step: int | None = None) -> FoundCheckpoint:
    """Returns the newest checkpoint that is not damaged.

    Args:
        folder: The run's folder.
        kind: Whether the run resumes alone or in a pack.
        step: The wanted step; later checkpoints are ignored. 0 is the beginning, without a checkpoint. None: any step.
    """
    paths = [path for path in _newest_first(folder, kind) if step is None or _step(path) <= step]
    damaged = [step] if step and not any(_step(path) == step for path in paths) else []
    found = FoundCheckpoint()
    for path in paths:
        if state := _read(path):
            found = FoundCheckpoint(path=path, step=_step(path), state=state)
            break
        damaged.append(_step(path))
    if damaged:
        steps = ", ".join(map(str, damaged))
        found.notes.append(f"The checkpoint of step {steps} was damaged, so the run resumed from step {found.step}.")
    return found


def remove_checkpoints(folder: Path, *, after_step: int = -1) -> None:
    """Removes the checkpoints of later steps; by default all checkpoints."""
    for kind in ("last", "slot"):
        for path in _newest_first(folder, kind):
            if _step(path) > after_step:
                path.unlink(missing_ok=True)


def remove_older_checkpoints(folder: Path, *, kind: Kind) -> None:
    """Keeps the last two checkpoints of a kind."""
    for path in _newest_first(folder, kind)[NUM_KEPT:]:
        path.unlink(missing_ok=True)


def _newest_first(folder: Path, kind: str) -> list[Path]:
    found = [path for path in folder.glob(f"{kind}-*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the state in a checkpoint; None if it is damaged or has more than tensors and plain values."""
    if sha256_of(path) != path.stem.split("-")[2]:
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError):  # another program wrote it under a matching name
        return None
    return state
