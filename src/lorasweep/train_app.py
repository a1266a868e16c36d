"""`lorasweep train` as a Hydra app: one run, or a grid (`-m`) whose jobs Hydra's sweepers and launchers start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from omegaconf import DictConfig, OmegaConf
from rich.text import Text

from lorasweep.config.build import as_settings
from lorasweep.config.command_line import add_double_plus, describe_job, parse_overrides
from lorasweep.config.compose import (
    apply_settings,
    build_run,
    choose_options,
    merge_settings,
    one_line_errors,
    packaged_folder,
    refuse_secrets,
    register_search_path,
)
from lorasweep.config.redaction import redact
from lorasweep.config.run import RunConfig
from lorasweep.console import EscapingConsole, say, say_error
from lorasweep.errors import INTERRUPTED_EXIT_CODE, ConfigError, LoraSweepError
from lorasweep.results import RunResult
from lorasweep.training.torch_variables import quick_imports

ShowResult = Callable[[RunResult, str], int]
ShowError = Callable[[LoraSweepError | OSError, str], int]


class JobError(Exception):
    """A job of a grid failed. The arguments are its exit code, its error as a sentence, and its process id."""


def run_train_app(arguments: argparse.Namespace, *, show_result: ShowResult, show_error: ShowError) -> int:
    """Trains the run, or each job of a grid, or only shows settings or examples. Returns the exit code.

    `show_result` prints a run's result, and `show_error` an error. Both return an exit code and get the overrides of a
    job of a grid, or an empty text for a single run. Launchers call them in other processes.

    Raises:
        ConfigError: An argument is not an override, or Hydra refuses one.
        RecordError: `--from` names no sweep with recommended settings.
    """
    settings: Mapping[str, Any] = {}
    origin: Mapping[str, Any] = {}
    if arguments.source is not None:
        from lorasweep.report.recommend import read_recommended  # noqa: PLC0415 (slow to import)

        settings, origin = read_recommended(Path(arguments.source))
    typed = parse_overrides(arguments.overrides)
    refuse_secrets(typed)  # because Hydra prints the overrides of a job that fails
    options = choose_options("train", merge_settings(settings, typed))
    words = [option for option in options if option.partition("=")[0] not in typed]
    words += add_double_plus(arguments.overrides)
    is_grid, codes = arguments.multirun, [0]

    def run_job(composed: DictConfig) -> float | None:
        job = redact(describe_job(HydraConfig.get().overrides.task, words)) if is_grid else ""
        code, reason, score = 0, "", None
        try:
            layers = merge_settings(settings, parse_overrides(HydraConfig.get().overrides.task))
            values = apply_settings("train", composed, layers, require_all=not arguments.cfg)
            config = build_run(values)
            if arguments.cfg:
                say(OmegaConf.to_yaml(OmegaConf.create(as_settings(config))).removesuffix("\n"))
                return None
            from lorasweep.sweep.definition.typed import check_sources  # noqa: PLC0415 (it loads Optuna)

            check_sources(config, layers)
            if arguments.show_examples is not None:
                _show_examples(config, arguments.show_examples)
            else:
                result = _train(config, values, origin=origin, is_grid=is_grid)
                code, reason, score = show_result(result, job), result.record.reason or "", result.record.score
        except (LoraSweepError, OSError) as error:
            code, reason = show_error(error, job), str(error)
        if code == INTERRUPTED_EXIT_CODE and is_grid:  # this ends the grid
            raise KeyboardInterrupt
        if code and is_grid:
            raise JobError(code, reason, os.getpid())
        codes.append(code)  # a single run raises nothing, because Hydra would print a line for the error
        return None if code else score  # an optimizing sweeper reads it

    try:
        _run_hydra([*(["--multirun"] if is_grid else []), *words], run_job)
    except JobError as error:
        code: int
        code, reason, process = error.args
        if process != os.getpid():  # the job's process printed the error, perhaps into a file
            say_error(f"a job failed: {reason}")
        return code
    return max(codes)


def _show_examples(config: RunConfig, number: int) -> None:
    """Prints the first training examples. What is scored is green on a terminal, elsewhere between brackets."""
    with quick_imports():
        from lorasweep.data.rows import list_passages  # noqa: PLC0415 (torch is slow to import)
        from lorasweep.models.load import load_tokenizer  # noqa: PLC0415
        from lorasweep.tasks.splits import check_model_kind  # noqa: PLC0415
        from lorasweep.tasks.task import find_task  # noqa: PLC0415

    if number < 1:
        raise ConfigError(f"`--show-examples >= 1` must hold, but got {number}.")
    if config.data.task_path is None:
        raise ConfigError(
            f"`--show-examples` must be missing with `data={config.data.name}`, which has no text. Remove it."
        )
    check_model_kind(config.data, config.model.kind)
    tokenizer, task = load_tokenizer(config.model), find_task(config.data)
    source = task.read(config.data)
    train = task.build_rows(source.train, config=config.data, source=source, tokenizer=tokenizer)
    for note in (*source.notes, *train.notes):
        say(f"• {note}", file=sys.stderr)
    console = EscapingConsole(highlight=False, soft_wrap=True)
    before, after = ("", "") if console.is_terminal and not console.no_color else ("⟦", "⟧")
    for index in range(min(number, len(train))):
        console.rule(f"example {index + 1} of {len(train)}")
        shown = Text()
        for text, is_scored in list_passages(train, index, tokenizer=tokenizer):
            shown.append(f"{before}{text}{after}" if is_scored else text, "bold green" if is_scored else "")
        console.print(shown)


def _run_hydra(words: Sequence[str], task: Callable[[DictConfig], float | None]) -> None:
    """Calls Hydra's main function with a command line. Raises ConfigError if Hydra refuses a setting."""
    argv = sys.argv

    def task_with_argv(composed: DictConfig) -> float | None:
        sys.argv = argv  # Lightning starts other processes with this command line
        return task(composed)

    register_search_path()
    app = hydra.main(version_base="1.3", config_path=str(packaged_folder("conf").resolve()), config_name="train")
    sys.argv = ["lorasweep train", *words]
    try:
        with one_line_errors(), env_override({"HYDRA_FULL_ERROR": "1"}):  # Hydra raises errors instead of printing them
            app(task_with_argv)()
    finally:
        sys.argv = argv


def _train(config: RunConfig, values: Mapping[str, Any], *, origin: Mapping[str, Any], is_grid: bool) -> RunResult:
    with quick_imports():
        from lorasweep.sessions import run_config  # noqa: PLC0415 (torch is slow to import, and `--help` does not need it)

    if is_grid and config.trainer.needs_process_group:
        raise ConfigError(
            "`trainer.devices` must be 1 and `trainer.strategy` auto with `-m`, but got "
            f"{config.trainer.devices!r} and {config.trainer.strategy_name}. Use `lorasweep sweep` instead of a grid."
        )
    return run_config(config, output=values["output"], resume=bool(values["resume"]), origin=origin)
