"""The last two checkpoints of a run, each named by its step and by the SHA-256 of its content.

A file whose content does not match its name was cut short or damaged. It is never loaded; the one before it is used.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch

from lorasweep.disk import move_into_place, temporary_name
from lorasweep.errors import RecordError
from lorasweep.record import read_run, sha256_of

Kind = Literal["last", "slot"]
"""`last`: Lightning's, of a run alone. `slot`: of a run in a pack."""
NUM_KEPT = 2
_NAME = re.compile(r"(last|slot)-(\d{8})-([0-9a-f]{64})\.ckpt")


@dataclass(frozen=True, kw_only=True)
class FoundCheckpoint:
    """The checkpoint from which a run resumes, if there is one."""

    path: Path | None = None
    """The newest whole checkpoint; None if the run begins anew."""
    step: int = 0
    """Optimizer steps done there."""
    state: dict[str, Any] = field(default_factory=dict)
    damaged: tuple[int, ...] = ()
    """Steps of the newer checkpoints, which are damaged or missing."""

    @property
    def notes(self) -> list[str]:
        """Sentences on damaged checkpoints for the run's record."""
        if not self.damaged:
            return []
        steps = ", ".join(map(str, self.damaged))
        return [f"The checkpoint of step {steps} was damaged, so the run resumed from step {self.step}."]


def save_checkpoint(folder: Path, *, kind: Kind, step: int, save: Callable[[Path], None]) -> None:
    """Writes a checkpoint whole or not at all, beside the earlier ones.

    Args:
        folder: The run's folder.
        kind: Whether a run alone or a pack resumes from it.
        step: Optimizer steps done.
        save: Writes the checkpoint to the path that it is given.
    """
    temporary = temporary_name(folder / f"{kind}.ckpt")
    try:
        save(temporary)
        move_into_place(temporary, folder / f"{kind}-{step:08d}-{sha256_of(temporary)}.ckpt")
    finally:
        temporary.unlink(missing_ok=True)


def find_checkpoint(folder: Path, *, kind: Kind, step: int | None = None) -> FoundCheckpoint:
    """Returns the newest whole checkpoint, with the steps of newer ones that are damaged.

    Args:
        folder: The run's folder.
        kind: Whether a run alone or a pack resumes from it.
        step: The wanted step, after which no checkpoint counts; 0 is the beginning, which has none. None: any step.
    """
    try:
        read_run(folder)
    except RecordError:  # a run can't resume without its record
        return FoundCheckpoint()
    paths = [path for path in _newest_first(folder, kind) if step is None or _step(path) <= step]
    damaged = [step] if step and not any(_step(path) == step for path in paths) else []
    for path in paths:
        state = _read(path)
        if state is not None:
            return FoundCheckpoint(path=path, step=_step(path), state=state, damaged=tuple(damaged))
        damaged.append(_step(path))
    return FoundCheckpoint(damaged=tuple(damaged))


def remove_checkpoints(folder: Path, *, after_step: int = -1) -> None:
    """Removes the checkpoints after a step; by default all of them."""
    for kind in ("last", "slot"):
        for path in _newest_first(folder, kind):
            if _step(path) > after_step:
                path.unlink(missing_ok=True)


def remove_older_checkpoints(folder: Path, *, kind: Kind) -> None:
    """Removes all checkpoints of a kind but the last two."""
    for path in _newest_first(folder, kind)[NUM_KEPT:]:
        path.unlink(missing_ok=True)


def _newest_first(folder: Path, kind: str) -> list[Path]:
    found = [path for path in folder.glob(f"{kind}-*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the state in a checkpoint; None if it is damaged or holds more than tensors and plain values."""
    if not path.is_file() or sha256_of(path) != path.stem.split("-")[2]:
        return None
    try:
        state = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except (UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, KeyError, OSError):
        return None  # a file of another program that was given a matching name
    return state if isinstance(state, dict) else None
