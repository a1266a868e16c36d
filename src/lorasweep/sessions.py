"""Runs a sweep or a single run in this process, from its settings to its result.

The Python API and the commands call these functions. A caller that has loaded models and data already hands them on in
an `InputsCache`.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from lorasweep.config.run import RunConfig
from lorasweep.console import EscapingConsole, say
from lorasweep.disk import claim_folder, lock_run, numbered_folders, require_new_folder
from lorasweep.errors import ConfigError
from lorasweep.record import RUN_FILE, read_run
from lorasweep.report.write import write_report
from lorasweep.results import RunResult, SweepResult, load_sweep
from lorasweep.runs.reproduce import Reproduction, reproduce_run
from lorasweep.sweep.assess import assess
from lorasweep.sweep.checks import (
    check_definition,
    list_retained,
    list_test_metrics,
    score_constant_answer,
)
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.lifecycle import create_sweep
from lorasweep.sweep.definition.arms import Definition
from lorasweep.sweep.draft import complete_definition
from lorasweep.sweep.fingerprints import compute_fingerprints
from lorasweep.sweep.status import SweepStatus, report_status, show_progress
from lorasweep.sweep.workers.train import train_sweep
from lorasweep.training.finished_run import check_same_run
from lorasweep.training.generation import check_answers
from lorasweep.training.inputs import InputsCache, load_inputs
from lorasweep.training.open_run import RunFolder
from lorasweep.training.prepare import check_run
from lorasweep.training.processes import join_processes, run_on_first
from lorasweep.training.run import train_run

Progress: TypeAlias = Callable[[SweepStatus], None] | Literal["auto", "verbose"] | None
"""Called with the state of a sweep about once a second, from a thread. `auto` shows a live table in a terminal, and
plain lines in a notebook or a pipe; `verbose` also prints the notes on data and packs first."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Batch systems send SIGUSR1 or SIGUSR2 shortly before a job's time limit."""


class _StopAtOnce(BaseException):
    """Leaves Lightning's Trainer, which would end the process without a message on KeyboardInterrupt."""


class StopSignal:
    """A context in which a stop signal only sets `requested`. A second Ctrl-C raises KeyboardInterrupt(`remedy`).

    Outside the main thread the context has no effect, because Python allows signal handlers only in the main thread.
    """

    def __init__(self, remedy: str = "") -> None:
        """`remedy` is a sentence that tells the user how to resume. It is shown after the second Ctrl-C."""
        self.requested = False
        self._remedy = remedy
        self._handlers: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._set_requested) for number in STOP_SIGNALS}
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if isinstance(error, _StopAtOnce):
            raise KeyboardInterrupt(self._remedy) from None

    def _set_requested(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise _StopAtOnce
        if number == signal.SIGINT:  # not by `print`, which the signal may have interrupted
            os.write(2, b"\nlorasweep: stops after the current step; a second Ctrl-C stops at once\n")
        self.requested = True


def run_definition(
    definition: Definition,
    inputs_cache: InputsCache,
    *,
    output: str | Path | None = None,
    progress: Progress,
) -> SweepResult:
    """Checks a sweep, creates its folder, trains it, and returns its result.

    The folder is `output`, else the setting `sweep.output`, else `outputs/NAME` with the next free number.
    Raises ConfigError if the sweep can't run as asked; then nothing was written.
    """
    wanted = definition.sweep_config.sweep.output if output is None else str(output)
    create = check_sweep(definition, inputs_cache, new_folder=wanted)
    folders = numbered_folders(Path("outputs") / definition.name)
    with claim_folder(None if wanted is None else Path(wanted), otherwise=folders, key="sweep.output") as path:
        opened = create(path)
    return run_opened_sweep(opened, inputs_cache, progress=progress)


def check_sweep(
    definition: Definition, inputs_cache: InputsCache, *, new_folder: str | None = None
) -> partial[SweepFolder]:
    """Returns the function that creates a sweep in a folder. Raises ConfigError if the sweep can't run as asked."""
    definition = complete_definition(definition, inputs_cache)
    metric = check_definition(definition, inputs_cache, new_folder=new_folder)
    assessment = assess(definition, inputs_cache)
    return partial(
        create_sweep,
        definition,
        metric=metric,
        test_metrics=list_test_metrics(definition, metric),
        retained=list_retained(definition, inputs_cache),
        constant_answer=score_constant_answer(definition, inputs_cache),
        fingerprints=compute_fingerprints(definition, inputs_cache),
        notes=assessment.others,
        warnings=assessment.warnings,
    )


def run_opened_sweep(opened: SweepFolder, inputs_cache: InputsCache, *, progress: Progress) -> SweepResult:
    """Trains the remaining trials of an open sweep and closes it; writes the report if the sweep is complete."""
    folder = opened.path
    remedy = f"To resume type `lorasweep sweep --resume {folder}`"
    shown: AbstractContextManager[Any] = nullcontext()
    if isinstance(progress, str):
        shown = show_progress(folder, EscapingConsole(), verbose=progress == "verbose")
    elif progress is not None:
        shown = report_status(folder, progress)
    try:
        with StopSignal(remedy) as stop, shown:
            is_complete = train_sweep(opened, inputs_cache, stop_requested=stop)
        result = load_sweep(folder)
        if is_complete:
            write_report(result.findings)
        return result
    except KeyboardInterrupt:  # also after the stop signal's context has ended
        raise KeyboardInterrupt(remedy) from None


def run_config(
    config: RunConfig, *, output: str | Path | None, resume: bool, origin: Mapping[str, Any] = MappingProxyType({})
) -> RunResult:
    """Trains one run and returns its result. Each process of the run calls this.

    `output` is a new folder, or that of the run to resume; None takes the next free one. `origin` names the sweep,
    arm and trial from which the settings come.

    Raises ConfigError if the request is wrong, and RunError if the run fails.
    """
    with ExitStack() as claim, join_processes(config.trainer) as group:
        path = None if output is None else Path(output)
        complete = run_on_first(group, lambda: _check_run_folder(path, config, resume=resume))
        if complete is not None:
            return complete
        with group.rank_zero_first(local=True):  # one process of each node downloads, then the others read its cache
            inputs = load_inputs(config)
        check_run(config, inputs.base)
        if (answers := config.data.generated) is not None and answers.on_validation:
            check_answers(config, inputs.splits.validation, inputs=inputs)
        trial = f"of trial {origin['trial']}" if origin.get("trial") is not None else "that were predicted best"
        used = [f"settings {trial} of arm `{origin['arm']}` in {origin['sweep']}"] if origin else []
        notes = [*used, *inputs.describe_lost(config, has_test=False), *inputs.list_notes(config)]
        for note in notes if group.is_global_zero else ():
            say(f"• {note}", file=sys.stderr)
        # after the checks, so that a wrong request creates no folder
        folder = run_on_first(group, lambda: _claim_run_folder(path, claim, resume=resume))
        with StopSignal(f"To resume add `output={folder} resume=true` to the same command") as stop:
            run_folder = RunFolder(path=folder, origin=origin)
            inputs = inputs.prepare(config, folder=folder)
            record = train_run(config, run_folder, inputs=inputs, stop_requested=stop, resume=resume)
        return RunResult(folder=folder, record=record)


def _check_run_folder(path: Path | None, config: RunConfig, *, resume: bool) -> RunResult | None:
    """Checks the folder of a run. Returns its result if the run to resume is already complete, otherwise None."""
    if path is None:
        if resume:
            raise ConfigError("`resume=true` must come with `output=DIR`, the folder of the run, but `output` is null.")
        return None
    if not resume or not (path / RUN_FILE).is_file():
        require_new_folder(path, key="output")
        return None
    record = read_run(path)
    check_same_run(record, config)
    return RunResult(folder=path, record=record) if record.status == "complete" else None


def _claim_run_folder(path: Path | None, claim: ExitStack, *, resume: bool) -> Path:
    """Returns the folder of a run, new or to be resumed, which is locked until the end of `claim`."""
    if not (resume and path is not None and (path / RUN_FILE).is_file()):
        numbers = (Path("outputs") / "train" / f"{number:04d}" for number in itertools.count(1))
        path = claim.enter_context(claim_folder(path, otherwise=numbers, key="output"))
    return claim.enter_context(lock_run(path))


def reproduce(run: Path, *, output: Path | None, tolerance: float | None, steps: int | None) -> Reproduction:
    """Trains a run again and compares it with the original. Arguments and errors are those of `reproduce_run`.

    `output` is a new folder, by default the next free `outputs/reproduce/NAME`.
    """
    folders = numbered_folders(Path("outputs") / "reproduce" / run.resolve().name)
    with StopSignal() as stop, claim_folder(output, otherwise=folders, key="--output") as claimed:
        return reproduce_run(run, output=claimed, tolerance=tolerance, steps=steps, stop_requested=stop)
