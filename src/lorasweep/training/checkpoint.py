"""What a run resumes from: its last two checkpoints, each named by its step and by the SHA-256 of its content.

A file whose content is not what its name says was cut short or damaged; it is never opened, and the one before counts.
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
"""`last`: of a run alone (Lightning's). `slot`: of a run in a pack."""
KEPT = 2
_NAME = re.compile(r"(last|slot)-(\d{8})-([0-9a-f]{64})\.ckpt")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What there is to go on from."""

    path: Path | None = None
    """The newest whole checkpoint, or None."""
    step: int = 0
    """Optimizer steps done there."""
    state: dict[str, Any] = field(default_factory=dict)
    damaged: tuple[int, ...] = ()
    """Steps of newer checkpoints that are damaged, or of the wanted one where it is gone."""

    @property
    def notes(self) -> list[str]:
        """What a record is to say of damaged checkpoints: a sentence, or nothing."""
        if not self.damaged:
            return []
        steps = ", ".join(map(str, self.damaged))
        return [f"The checkpoint of step {steps} was damaged, so the run went on from step {self.step}."]


def save_checkpoint(folder: Path, *, kind: Kind, step: int, save: Callable[[Path], None]) -> None:
    """Writes a checkpoint whole or not at all, beside those that are there.

    Args:
        folder: The run's.
        kind: Who resumes from it.
        step: Optimizer steps done.
        save: Writes it where it is told.
    """
    temporary = temporary_name(folder / f"{kind}.ckpt")
    try:
        save(temporary)
        move_into_place(temporary, folder / f"{kind}-{step:08d}-{sha256_of(temporary)}.ckpt")
    finally:
        temporary.unlink(missing_ok=True)


def find_checkpoint(folder: Path, *, kind: Kind, step: int | None = None) -> Found:
    """Returns the newest checkpoint that is whole, with the steps of those that are not.

    Args:
        folder: The run's.
        kind: Who resumes from it.
        step: The checkpoint that is wanted: later ones do not count. 0 means the beginning, which needs none.
    """
    if step == 0 or not _has_record(folder):
        return Found()
    paths = [path for path in _newest_first(folder, kind) if step is None or _step(path) <= step]
    damaged = [] if step is None or any(_step(path) == step for path in paths) else [step]
    for path in paths:
        state = _read(path)
        if state is not None:
            return Found(path=path, step=_step(path), state=state, damaged=tuple(damaged))
        damaged.append(_step(path))
    return Found(damaged=tuple(damaged))


def remove_checkpoints(folder: Path, *, after_step: int = -1) -> None:
    """Removes the checkpoints after a step; by default all of them."""
    for kind in ("last", "slot"):
        for path in _newest_first(folder, kind):
            if _step(path) > after_step:
                path.unlink(missing_ok=True)


def remove_older_checkpoints(folder: Path, *, kind: Kind) -> None:
    """Removes all checkpoints of a kind but the last two."""
    for path in _newest_first(folder, kind)[KEPT:]:
        path.unlink(missing_ok=True)


def _has_record(folder: Path) -> bool:
    try:
        read_run(folder)
    except RecordError:
        return False
    return True


def _newest_first(folder: Path, kind: str) -> list[Path]:
    found = [path for path in folder.glob(f"{kind}-*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _is_whole(path: Path) -> bool:
    return path.is_file() and sha256_of(path) == path.name.removesuffix(".ckpt").split("-")[2]


def _read(path: Path) -> dict[str, Any] | None:
    if not _is_whole(path):
        return None
    try:
        state = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except (UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError, KeyError, OSError):
        return None  # a foreign file that was given the right name
    return state if isinstance(state, dict) else None
