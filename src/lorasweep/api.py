"""Sweeps and runs from Python. The command line prints the same results.

A wrong request raises `ConfigError`, a damaged file `RecordError`, any other failure another `LoraSweepError`.
Ctrl-C ends a sweep or a run after the current step, with a checkpoint: its result has the status `interrupted` and can
be resumed. A second Ctrl-C raises KeyboardInterrupt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lorasweep.config.command_line import parse_overrides
from lorasweep.config.compose import compose_run, merge_settings
from lorasweep.errors import ConfigError
from lorasweep.record import write_record
from lorasweep.report.recommend import read_recommended
from lorasweep.results import RunResult, SweepResult, load_run, load_sweep
from lorasweep.sessions import Progress, run_config, run_definition, run_opened_sweep
from lorasweep.sweep.assess import assess
from lorasweep.sweep.checks import check_definition
from lorasweep.sweep.controller.lifecycle import reopen_sweep
from lorasweep.sweep.definition.arms import read_definition
from lorasweep.sweep.definition.sweep_file import find_sweep_file
from lorasweep.sweep.draft import draft_definition
from lorasweep.sweep.fingerprints import compute_fingerprints
from lorasweep.training.inputs import InputsCache

__all__ = ["load_run", "load_sweep", "resume_sweep", "run_sweep", "train_run"]

OverrideWords: TypeAlias = Sequence[str] | Mapping[str, Any]
"""Arguments of the command line (`["optim.lr=1e-3"]`), or dotted keys and values (`{"optim.lr": 1e-3}`)."""


def run_sweep(
    sweep: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: OverrideWords = (),
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
        sweep: Name of a sweep of lorasweep or of the folder `sweeps/`, a YAML file, or the content of a YAML file.
            None drafts a sweep for the data of the overrides.
        overrides: Settings that replace settings of the sweep.
        output: A new or empty folder; by default `outputs/NAME` with the next free number.
        progress: `auto` and `verbose` show the state of the sweep while it runs, a function receives it, None shows
            nothing.

    Raises:
        ConfigError: The request is wrong; nothing was written.
        LoraSweepError: The sweep can't continue. Call `resume_sweep` after you have removed the cause.
    """
    inputs_cache = InputsCache()
    if sweep is None:
        definition = draft_definition(overrides, inputs_cache)
    else:
        definition = read_definition(sweep if isinstance(sweep, Mapping) else find_sweep_file(str(sweep)), overrides)
    return run_definition(definition, inputs_cache, output=output, progress=progress)


def resume_sweep(
    folder: str | Path,
    *,
    overrides: OverrideWords = (),
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
        ConfigError: A trial that has begun would change, or the data, the model or the user's code has; nothing was
            written.
        RecordError: The folder is not a sweep, is damaged, or another process runs it.
        LoraSweepError: The sweep can't continue.
    """
    opened = reopen_sweep(Path(folder), changes=parse_overrides(overrides))
    inputs_cache, definition, record = InputsCache(), opened.definition, opened.record
    try:
        metric, before = check_definition(definition, inputs_cache).name, record.search_metric.name
        if metric != before:
            raise ConfigError(f"`data.metric` must stay {before!r} for all arms, but got {metric!r}.")
        record.fingerprints = compute_fingerprints(definition, inputs_cache, recorded=record.fingerprints)
        assessment = assess(definition, inputs_cache)
        record.warnings = [*assessment.warnings, *record.warnings]
        if record.changes:
            opened.note(assessment.others)
        write_record(record, opened.path)  # now, because a controller in another process reads the changes from it
    except BaseException:
        opened.close()
        raise
    return run_opened_sweep(opened, inputs_cache, progress=progress)


def train_run(
    overrides: OverrideWords = (),
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
        from_sweep: Folder of a complete sweep, whose recommended settings replace the defaults. `SWEEP/NAME` takes
            those of an arm, or of one of its confirmed values.
        output: A new or empty folder; by default the first free one of `outputs/train/0001`, `0002`, ...
        resume: Whether to continue the run in `output`.

    Raises:
        ConfigError: The request is wrong.
        RunError: The run diverged or does not fit in memory. Its record has the reason.
    """
    settings, origin = read_recommended(Path(from_sweep)) if from_sweep is not None else ({}, {})
    config = compose_run(merge_settings(settings, parse_overrides(overrides)))
    return load_run(run_config(config, output=output, resume=resume, origin=origin).folder)
