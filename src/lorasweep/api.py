"""Sweeps and runs from Python. The command line calls these functions and prints their results.

A wrong request raises `ConfigError`, a damaged file `RecordError`, any other failure another `LoraSweepError`.
Ctrl-C ends a sweep or a run after the current step, with a checkpoint: its result has the status `interrupted` and can
be resumed. A second Ctrl-C raises KeyboardInterrupt.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch

from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import compose_run, merge_settings
from lorasweep.config.data import ScoreMetric
from lorasweep.config.run import RunConfig
from lorasweep.console import EscapingConsole, say
from lorasweep.disk import claim_folder, lock_folder, numbered_folders, require_new_folder
from lorasweep.errors import ConfigError, RecordError
from lorasweep.record import RUN_FILE, SWEEP_FILE, read_run, read_sweep, write_record
from lorasweep.report.recommend import read_recommended
from lorasweep.report.write import write_report
from lorasweep.results import RunResult, SweepResult, load_run, load_sweep
from lorasweep.runs.reproduce import Reproduction, compare_sweeps, reproduce_run
from lorasweep.sweep.checks import (
    check_definition,
    list_model_warnings,
    list_notes,
    list_retained,
    list_test_metrics,
    score_constant_answer,
    set_steps,
)
from lorasweep.sweep.controller.folder import SweepFolder
from lorasweep.sweep.controller.lifecycle import create_sweep, read_saved_definition, reopen_sweep
from lorasweep.sweep.definition.arms import Definition, read_definition
from lorasweep.sweep.definition.overrides import SweepOverrides
from lorasweep.sweep.definition.sweep_file import find_sweep_file
from lorasweep.sweep.draft import draft_definition
from lorasweep.sweep.status import SweepStatus, report_status, show_progress
from lorasweep.sweep.workers.train import train_sweep
from lorasweep.training.answers import check_answers, get_answers
from lorasweep.training.inputs import InputsCache, build_inputs
from lorasweep.training.module import check_run
from lorasweep.training.processes import join_processes, run_on_first
from lorasweep.training.restore import check_same_run
from lorasweep.training.run import train_run as train_in_folder
from lorasweep.training.run_log import RunFolder
from lorasweep.training.stop_signal import StopSignal

__all__ = ["load_run", "load_sweep", "resume_sweep", "run_sweep", "train_run"]

Overrides: TypeAlias = Sequence[str] | Mapping[str, Any]
"""Arguments of the command line (`["optim.lr=1e-3"]`), or dotted keys and values (`{"optim.lr": 1e-3}`)."""
Progress: TypeAlias = Callable[[SweepStatus], None] | Literal["auto", "verbose"] | None
"""Called with the state of a sweep about once a second, from a thread. `auto` shows a live table in a terminal, and
plain lines in a notebook or a pipe; `verbose` also prints the notes on data and packs first."""


def run_sweep(
    sweep: str | Path | Mapping[str, Any] | Definition | None = None,
    *,
    overrides: Overrides = (),
    output: str | Path | None = None,
    progress: Progress = "auto",
) -> SweepResult:
    """Runs a sweep, writes its report, and returns its result.

    >>> arms = {"lora": {"settings": {"method": "lora"}, "space": {"method.rank": [1, 4]}, "trials": 2}}
    >>> small = ["trainer.max_steps=2", "data.block_length=32", "data.max_validation_blocks=2", "confirm.seeds=0"]
    >>> result = lorasweep.run_sweep({"arms": arms}, overrides=small, progress=None)
    >>> result.status, result.best("lora").state
    ('complete', 'complete')

    Args:
        sweep: Name of a sweep of lorasweep or of the folder `sweeps/`, a YAML file, the content of a YAML file, or a
            definition that was read. None drafts a sweep for the data of the overrides.
        overrides: Settings that replace settings of the sweep.
        output: A new or empty folder; by default `outputs/NAME` with the next free number.
        progress: Receives the state of the sweep while it runs.

    Raises:
        ConfigError: The request is wrong; nothing was written.
        LoraSweepError: The sweep can't continue. Call `resume_sweep` after you have removed the cause.
    """
    definition = sweep if isinstance(sweep, Definition) else read_sweep_definition(sweep, overrides)
    inputs_cache = InputsCache()
    opened = start_sweep(set_steps(definition, inputs_cache), inputs_cache, output=output)
    return train_opened_sweep(opened, inputs_cache, progress=progress)


def resume_sweep(
    folder: str | Path,
    *,
    overrides: Overrides = (),
    progress: Progress = "auto",
) -> SweepResult:
    """Continues a sweep to its number of trials, writes its report, and returns its result.

    The sweep may grow: more trials or confirm seeds. Trials that have begun stay as they are.

    >>> result = lorasweep.resume_sweep("outputs/tiny", overrides=["arms.lora.trials=3"], progress=None)
    >>> len(result.trials_dataframe())
    3

    Args:
        folder: The sweep's folder.
        overrides: Changed settings of `worker` and `confirm`, or more trials such as `["arms.lora.trials=20"]`.
        progress: As in `run_sweep`.

    Raises:
        ConfigError: A trial that has begun would change; nothing was written.
        RecordError: The folder is not a sweep, is damaged, or another process runs it.
        LoraSweepError: The sweep can't continue.
    """
    opened = reopen_sweep(Path(folder), changes=parse_overrides(overrides))
    inputs_cache, definition, record = InputsCache(), opened.definition, opened.record
    try:
        metric, before = check_definition(definition, inputs_cache).name, record.search_metric.name
        if metric != before:
            raise ConfigError(f"`data.metric` must stay {before!r} for all arms, but got {metric!r}.")
        record.warnings += list_model_warnings(definition, inputs_cache)
        if record.changes:
            opened.note(list_notes(definition, inputs_cache))
        write_record(record, opened.path)  # now, because a controller in another process reads the changes from it
    except BaseException:
        opened.close()
        raise
    return train_opened_sweep(opened, inputs_cache, progress=progress)


def train_run(
    overrides: Overrides = (),
    *,
    from_sweep: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
) -> RunResult:
    """Trains one run and returns its result. If several processes train a run together, each of them calls this.

    >>> run = lorasweep.train_run({"method.rank": 8, "trainer.max_steps": 2, "data.block_length": 32})
    >>> run.status, run.metric, len(run.steps_dataframe())
    ('complete', 'bits_per_byte', 2)

    Args:
        overrides: The settings that differ from the defaults, such as `["method.rank=8", "optim.lr=1e-3"]`.
        from_sweep: Folder of a complete sweep, or `SWEEP/ARM`, whose recommended settings replace the defaults.
        output: A new or empty folder; by default the first free one of `outputs/train/0001`, `0002`, ...
        resume: Whether to continue the run in `output`.

    Raises:
        ConfigError: The request is wrong.
        RunError: The run diverged or does not fit in memory. Its record has the reason.
    """
    settings, origin = read_recommended(Path(from_sweep)) if from_sweep is not None else ({}, {})
    config = compose_run(merge_settings(settings, parse_overrides(overrides)))
    path = None if output is None else str(output)
    return load_run(train_config(config, output=path, resume=resume, origin=origin).folder)


def read_sweep_definition(sweep: str | Path | Mapping[str, Any] | None, overrides: Overrides) -> Definition:
    """Reads and checks a sweep. None drafts one for the data of the overrides."""
    parsed = SweepOverrides.parse(overrides)
    if sweep is None:
        return draft_definition(parsed)
    return read_definition(sweep if isinstance(sweep, Mapping) else find_sweep_file(str(sweep)), parsed)


def start_sweep(
    definition: Definition, inputs_cache: InputsCache, *, output: str | Path | None, default: Path | None = None
) -> SweepFolder:
    """Checks a sweep with its models, data and workers, and creates its folder.

    The folder is `output`, else the setting `sweep.output`, else `default` (`outputs/NAME`) with the next free number.

    Raises:
        ConfigError: The sweep can't run as asked; nothing was written.
    """
    metric = check_sweep(definition, inputs_cache, output=output)
    constant_answer, notes = score_constant_answer(definition, inputs_cache), list_notes(definition, inputs_cache)
    wanted = definition.sweep_config.sweep.output if output is None else output
    folders = numbered_folders(default or Path("outputs") / definition.name)
    with claim_folder(None if wanted is None else Path(wanted), otherwise=folders, key="sweep.output") as path:
        return create_sweep(
            definition,
            path,
            metric=metric,
            test_metrics=list_test_metrics(definition, metric),
            retained=list_retained(definition, inputs_cache),
            constant_answer=constant_answer,
            notes=notes,
            warnings=list_model_warnings(definition, inputs_cache),
        )


def check_sweep(definition: Definition, inputs_cache: InputsCache, *, output: str | Path | None = None) -> ScoreMetric:
    """Checks a sweep with its models, data and workers, and that its folder is free. Returns its metric."""
    wanted = definition.sweep_config.sweep.output if output is None else str(output)
    if wanted is not None:
        remedy = f"To resume a sweep type `lorasweep sweep --resume {wanted}`."
        require_new_folder(Path(wanted), key="sweep.output", remedy=remedy)
    return check_definition(definition, inputs_cache)


def train_opened_sweep(opened: SweepFolder, inputs_cache: InputsCache, *, progress: Progress) -> SweepResult:
    """Trains the remaining trials of an open sweep and closes it; writes the report if the sweep is complete."""
    folder = opened.path
    remedy = f"To resume type `lorasweep sweep --resume {folder}`"
    try:
        with StopSignal(remedy) as stop, _report_progress(folder, progress):
            is_complete = train_sweep(opened, inputs_cache, stop_requested=stop)
        result = load_sweep(folder)
        if is_complete:
            write_report(result.findings)
        return result
    except KeyboardInterrupt:  # also after the stop signal's context has ended
        raise KeyboardInterrupt(remedy) from None


def train_config(
    config: RunConfig, *, output: str | None, resume: bool, origin: Mapping[str, Any] = MappingProxyType({})
) -> RunResult:
    with ExitStack() as claim, join_processes(config.trainer) as group:
        complete = run_on_first(group, lambda: _check_run_folder(output, config, resume=resume))
        if complete is not None:
            return complete
        with group.rank_zero_first(local=True):  # one process of each node downloads, then the others read its cache
            inputs = build_inputs(config)
        check_run(config, inputs.base)
        if (answers := get_answers(config)) is not None and answers.on_validation:
            check_answers(config, inputs.splits.validation, inputs=inputs)
        trial = f"of trial {origin['trial']}" if origin.get("trial") is not None else "that were predicted best"
        used = [f"settings {trial} of arm `{origin['arm']}` in {origin['sweep']}"] if origin else []
        for note in (*used, *inputs.list_notes(config)) if group.is_global_zero else ():
            say(f"• {note}", file=sys.stderr)
        # after the checks, so that a wrong request creates no folder
        folder = run_on_first(group, lambda: claim.enter_context(_claim_run_folder(output, resume=resume)))
        with StopSignal(f"To resume add `output={folder} resume=true` to the same command") as stop:
            run_folder = RunFolder(path=folder, origin=origin)
            record = train_in_folder(config, run_folder, inputs=inputs, stop_requested=stop, resume=resume)
        return RunResult(folder=folder, record=record)


def reproduce(
    folder: Path, *, output: Path | None = None, tolerance: float | None = None, steps: int | None = None
) -> Reproduction:
    """Runs a run or a whole sweep again and compares both.

    Args:
        folder: Folder of a run or a sweep. A sweep runs with the same number of threads, and must be identical.
        output: A new or empty folder; by default `outputs/reproduce/NAME` with the next free number.
        tolerance: As in `reproduce_run`; only for a run.
        steps: As in `reproduce_run`; only for a run.

    Raises:
        ConfigError: The request is wrong, or the sweep had several workers, or grew.
        RecordError: The record is damaged, or the sweep is not complete.
    """
    default = Path("outputs") / "reproduce" / folder.resolve().name
    if (folder / SWEEP_FILE).is_file():
        if (tolerance, steps) != (None, None):
            raise ConfigError("`--tolerance` and `--steps` must be missing with a sweep, which is compared as a whole.")
        return _reproduce_sweep(folder, output, default=default)
    with StopSignal() as stop, claim_folder(output, otherwise=numbered_folders(default), key="--output") as claimed:
        return reproduce_run(folder, output=claimed, tolerance=tolerance, steps=steps, stop_requested=stop)


def _reproduce_sweep(folder: Path, output: Path | None, *, default: Path) -> Reproduction:
    record, definition = read_sweep(folder), read_saved_definition(folder)
    if record.status != "complete":
        raise RecordError(f"a sweep must be complete to be reproduced, but {str(folder)!r} is {record.status}.")
    worker = definition.sweep_config.worker.name
    if worker != "local" or any(change.trials for change in record.changes):
        reason = f"had `worker={worker}`" if worker != "local" else "grew, and its proposals depend on when it did"
        raise ConfigError(
            f"a sweep must have had one worker and not have grown to be reproduced as a whole, but {str(folder)!r} "
            f"{reason}. Reproduce one of its runs."
        )
    torch.set_num_threads(record.threads or torch.get_num_threads())
    if output is not None:
        require_new_folder(output, key="--output")
    # The setting names the folder of the original, and the sweep file may be gone: the record has its content.
    sweep_config = replace(definition.sweep_config, sweep=replace(definition.sweep_config.sweep, output=None))
    definition, inputs_cache = replace(definition, sweep_config=sweep_config, source=None), InputsCache()
    opened = start_sweep(definition, inputs_cache, output=output, default=default)
    result = train_opened_sweep(opened, inputs_cache, progress="auto")
    if result.status == "complete":
        return compare_sweeps(folder, result.folder)
    remedy = f"interrupted. To resume type:\n    lorasweep sweep --resume {result.folder}"
    return Reproduction(folder=result.folder, verdict="interrupted", description=remedy)


def _report_progress(folder: Path, progress: Progress) -> Any:
    if progress is None:
        return nullcontext()
    if isinstance(progress, str):
        return show_progress(folder, EscapingConsole(), verbose=progress == "verbose")
    return report_status(folder, progress)


def _check_run_folder(output: str | None, config: RunConfig, *, resume: bool) -> RunResult | None:
    """Checks the folder of a run. Returns its result if the run to resume is already complete, otherwise None."""
    if resume and output is None:
        raise ConfigError("`resume=true` must come with `output=DIR`, the folder of the run, but `output` is null.")
    if output is None:
        return None
    path = Path(output)
    if not resume or not (path / RUN_FILE).is_file():
        require_new_folder(path, key="output")
        return None
    record = read_run(path)
    check_same_run(record, config)
    return RunResult(folder=path, record=record) if record.status == "complete" else None


def _claim_run_folder(output: str | None, *, resume: bool) -> AbstractContextManager[Path]:
    if resume and output is not None and (Path(output) / RUN_FILE).is_file():
        return lock_folder(Path(output), key="output")
    numbers = (Path("outputs") / "train" / f"{number:04d}" for number in itertools.count(1))
    return claim_folder(None if output is None else Path(output), otherwise=numbers, key="output")
