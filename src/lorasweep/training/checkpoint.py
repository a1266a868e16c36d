"""Checkpoints, from which runs and packs resume. Each is one file of Lightning, which is replaced atomically.

Beside the keys of Lightning it has `runs`, the names of the runs' folders in slot order, and `ends`, the status and
reason of runs that ended at this step and may not be closed yet. The file of a pack that has done no step has no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError, first_line

RUN_CHECKPOINT = "last.ckpt"
"""File in the folder of a run that trains outside of a sweep's packs."""


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(_save, state))


def _save(state: Mapping[str, Any], path: Path) -> None:
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
    if not {"runs", "ends"} <= state.keys():
        raise RecordError(
            f"{str(path)!r} must be a checkpoint of `lorasweep`, but has the keys {', '.join(sorted(state))[:200]}. "
            "Remove it to train from the first step."
        )
    return state


def get_step(state: Mapping[str, Any]) -> int | None:
    """Returns the optimizer steps at a checkpoint; None if no run has done a step."""
    step = state.get("global_step")  # Lightning's name
    return None if step is None else int(step)


def select_runs(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Returns a checkpoint with these of its runs only, in this order. Runs that have ended stay if they are named."""
    kept = [state["runs"].index(name) for name in names if name in state["runs"]]
    selected = dict(state) | {
        "runs": [state["runs"][slot] for slot in kept],
        "ends": {name: end for name, end in state["ends"].items() if name in names},
    }
    if kept == list(range(len(state["runs"]))) or get_step(state) is None:
        return selected
    selected["progress"] = [state["progress"][slot] for slot in kept]
    selected["optimizer_states"] = [
        one | {"slots": [one["slots"][slot] for slot in kept]} for one in state["optimizer_states"]
    ]
    selected["state_dict"] = {
        f"slots.{number}.{name}": value
        for number, slot in enumerate(kept)
        for place, name, value in ((*key.split(".", 2)[1:], value) for key, value in state["state_dict"].items())
        if int(place) == slot
    }
    return selected


def split_checkpoint(file: Path, parts: Mapping[Path, Sequence[str]]) -> None:
    """Writes the states of these runs into other files, and removes `file` at the end unless it is one of them.

    Does nothing if `file` does not exist.
    """
    if not (state := read_checkpoint(file)):
        return
    for path, names in sorted(parts.items(), key=lambda part: part[0] == file):
        write_checkpoint(select_runs(state, names), path)
    if file not in parts:
        file.unlink()


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
