"""Trains one run in a folder of its own: checks the request, claims the folder, and says how to resume."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorasweep.config.run import RunConfig
from lorasweep.console import RUNNING_TRAINING, say_note
from lorasweep.disk import claim_folder, lock_run, require_new_folder
from lorasweep.errors import ConfigError
from lorasweep.record import RUN_FILE, read_run
from lorasweep.training.finished_run import check_same_run
from lorasweep.training.generation import check_answers
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.prepare import check_run
from lorasweep.training.processes import join_processes, run_on_first
from lorasweep.training.run import train_alone
from lorasweep.training.stop_signal import StopSignal


def train_solo_run(
    config: RunConfig, *, output: str | Path | None, resume: bool, origin: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """Trains one run and returns its folder. Each process of the run calls this.

    `output` is a new folder, or that of the run to resume; None means the next free one. `origin` names the sweep,
    arm and trial from which the settings come.

    Raises ConfigError if the request is wrong, RunError if the run fails, and RecordError if its record is damaged.
    """
    with ExitStack() as claim, join_processes(config.trainer) as group:
        path = None if output is None else Path(output)
        if run_on_first(group, lambda: _is_complete(path, config, resume=resume)):
            assert path is not None  # a new run is not complete
            return path
        with group.rank_zero_first(local=True):  # one process of each node downloads, then the others read its cache
            inputs = load_inputs(config)
        check_run(config, inputs.base)
        if (answers := config.data.generated) is not None and answers.on_validation:
            check_answers(config, inputs.splits.validation, inputs=inputs)
        trial = f"of trial {origin['trial']}" if origin.get("trial") is not None else "that were predicted best"
        used = [f"settings {trial} of arm `{origin['arm']}` in {origin['sweep']}"] if origin else []
        notes = [*used, *(note.text for note in inputs.list_notes(config))]
        for note in notes if group.is_global_zero else ():
            say_note(f"• {note}")
        # after the checks, so that a wrong request creates no folder
        folder = run_on_first(group, lambda: _claim_run_folder(path, claim, resume=resume))
        with StopSignal(f"To resume add `output={folder} resume=true` to the same command") as stop:
            inputs = inputs.prepare(config, folder=folder)
            run_folder = RunFolder(path=folder, origin=origin)
            on_phase = RUNNING_TRAINING.note
            train_alone(config, run_folder, inputs=inputs, stop_requested=stop, on_phase=on_phase, resume=resume)
        return folder


def _is_complete(path: Path | None, config: RunConfig, *, resume: bool) -> bool:
    """Checks the folder of a run, and returns whether the run to resume is already complete."""
    if path is None:
        if resume:
            raise ConfigError("`resume=true` must come with `output=DIR`, the folder of the run, but `output` is null.")
        return False
    if not resume or not (path / RUN_FILE).is_file():
        require_new_folder(path, key="output")
        return False
    record = read_run(path)
    check_same_run(record, config)
    return record.status == "complete"


def _claim_run_folder(path: Path | None, claim: ExitStack, *, resume: bool) -> Path:
    """Returns the folder of a new run or of the run to resume, and locks it until `claim` ends."""
    if not (resume and path is not None and (path / RUN_FILE).is_file()):
        numbers = (Path("outputs") / "train" / f"{number:04d}" for number in itertools.count(1))
        path = claim.enter_context(claim_folder(path, otherwise=numbers, key="output"))
    return claim.enter_context(lock_run(path))
