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
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lorasweep.config.command_line import describe_job, force_keys, parse_overrides, read_settings_file, sort_overrides
from lorasweep.config.compose import (
    add_search_path,
    build_run,
    compose_values,
    describe_hydra_error,
    layer_settings,
    packaged_folder,
    refuse_secrets,
)
from lorasweep.config.redaction import redact
from lorasweep.console import say, say_error
from lorasweep.errors import ConfigError, LoraSweepError
from lorasweep.quick_imports import quick_imports
from lorasweep.results import RunResult
from lorasweep.training.stop_signal import INTERRUPTED_EXIT_CODE

ShowResult = Callable[[RunResult, str], int]
ShowError = Callable[[LoraSweepError | OSError, str], int]


class JobError(Exception):
    """A job of a grid failed. The arguments are its exit code, its error as a sentence, and its process id."""


def run_train_app(arguments: argparse.Namespace, *, show_result: ShowResult, show_error: ShowError) -> int:
    """Trains the run, or each job of a grid, or only shows settings. Returns the exit code.

    Args:
        arguments: The parsed command line (`cli.build_parser`).
        show_result: Prints a run's result and returns its exit code. Launchers call it in other processes. It gets the
            overrides of a job of a grid; for a single run an empty text.
        show_error: Prints an error and returns its exit code; called like `show_result`.

    Raises:
        ConfigError: An argument is not an override, or a key or value is wrong.
        RecordError: `--from` names no sweep with recommended settings.
    """
    file_settings, origin, words = _read_source(arguments)
    run, hydra, search_path = sort_overrides(words)
    folders = [] if arguments.config_dir is None else [f"file://{arguments.config_dir.absolute()}"]
    with add_search_path([*folders, *search_path]):
        if arguments.cfg == "job":
            _print_settings(run, file_settings, package=arguments.package)
            return 0
        flags = _list_hydra_flags(arguments)
        if flags and file_settings:  # Hydra would show the settings without those of the file
            raise ConfigError(f"`{flags[0]}` must be used without a file of settings or `--from`.")
        refuse_secrets(parse_overrides(run))  # because Hydra prints the overrides of a job that fails
        is_grid, codes = arguments.multirun, [0]

        def train_job(_: Any) -> float | None:
            job = redact(describe_job(HydraConfig.get().overrides.task, run)) if is_grid else ""
            try:
                result = _train(file_settings=file_settings, origin=origin, is_grid=is_grid)
                code, reason = show_result(result, job), result.record.reason
            except (LoraSweepError, OSError) as error:
                code, reason = show_error(error, job), str(error)
            if code == INTERRUPTED_EXIT_CODE and is_grid:  # this ends the grid
                raise KeyboardInterrupt
            if code and is_grid:
                raise JobError(code, reason, os.getpid())
            codes.append(code)  # of a single run, because Hydra prints a line for each error
            return None if code else result.record.score  # an optimizing sweeper reads it

        try:
            _run_hydra([*flags, *(["--multirun"] if is_grid else [])], [*hydra, *force_keys(run)], train_job)
        except JobError as error:
            code: int
            code, reason, process = error.args
            if process != os.getpid():  # it printed the error elsewhere, perhaps into a file
                say_error(f"a job failed: {reason}")
            return code
        return max(codes)


def _run_hydra(flags: Sequence[str], overrides: Sequence[str], task: Callable[[Any], float | None]) -> None:
    """Calls Hydra's main function. Raises ConfigError if Hydra refuses a setting."""
    argv = sys.argv

    def task_with_argv(composed: Any) -> float | None:
        sys.argv = argv  # Lightning starts other processes with this command line
        return task(composed)

    app = hydra.main(version_base="1.3", config_path=str(packaged_folder("conf").resolve()), config_name="train")
    sys.argv = ["lorasweep train", *flags, *overrides]
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):  # Hydra raises errors instead of printing them
            app(task_with_argv)()
    except HydraException as error:
        raise ConfigError(describe_hydra_error(error)) from error
    finally:
        sys.argv = argv


def _list_hydra_flags(arguments: argparse.Namespace) -> list[str]:
    """Returns the flags with which Hydra shows settings and trains nothing."""
    package = ["--package", arguments.package] if arguments.package else []
    return [
        *(["--cfg", arguments.cfg, *package] if arguments.cfg else []),
        *(["--info", arguments.info] if arguments.info else []),
        *(["--hydra-help"] if arguments.hydra_help else []),
    ]


def _read_source(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Mapping[str, Any], Sequence[str]]:
    """Returns the settings of a file or of `--from`, the origin of the settings of `--from`, and the overrides."""
    first, *others = arguments.overrides or [""]
    is_file = first.endswith((".yaml", ".yml")) and "=" not in first
    if arguments.source is None:
        return (read_settings_file(Path(first)), {}, others) if is_file else ({}, {}, arguments.overrides)
    if is_file:
        raise ConfigError("`--from` must be used without a file of settings, but got both. Remove one of them.")
    from lorasweep.report.recommend import read_recommended  # noqa: PLC0415 (slow to import)

    return *read_recommended(Path(arguments.source)), arguments.overrides


def _print_settings(overrides: Sequence[str], file_settings: Mapping[str, Any], *, package: str | None) -> None:
    """Prints the settings of a run as YAML, or a part of them (`package`)."""
    values = compose_values("train", layer_settings(file_settings, parse_overrides(overrides)), require_all=False)
    build_run(values)  # raises if a value is wrong
    shown = OmegaConf.create(values)
    if package and not isinstance(shown := OmegaConf.select(shown, package), DictConfig):
        raise ConfigError(f"`--package` must name a group of settings, such as `method`, but got {package!r}.")
    say(OmegaConf.to_yaml(shown).removesuffix("\n"))


def _train(*, file_settings: Mapping[str, Any], origin: Mapping[str, Any], is_grid: bool) -> RunResult:
    """Trains one run. The settings are our own composition of Hydra's overrides.

    Hydra's composition knows neither the file of settings nor `method.alpha.over_rank`, and keeps the arguments of the
    default option if `_target_` names another class.
    """
    with quick_imports():
        from lorasweep import api  # noqa: PLC0415 (torch and Lightning are slow to import; `--help` needs neither)

    settings = layer_settings(file_settings, parse_overrides(HydraConfig.get().overrides.task))
    values = compose_values("train", settings)
    config = build_run(values)
    if is_grid and config.trainer.needs_process_group:
        raise ConfigError(
            "`trainer.devices` must be 1 and `trainer.strategy` auto with `-m`, but got "
            f"{config.trainer.devices!r} and {config.trainer.strategy_name}. Use `lorasweep sweep` instead of a grid."
        )
    return api.train_config(config, output=values["output"], resume=bool(values["resume"]), origin=origin)
