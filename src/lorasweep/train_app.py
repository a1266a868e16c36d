"""`lorasweep train` as a Hydra app: Hydra reads the command line, and composes one run or a grid of them (`-m`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig

from lorasweep.config.build import build
from lorasweep.config.command_line import (
    allow_new_arguments,
    check_train_arguments,
    parse_overrides,
    read_settings_file,
)
from lorasweep.config.compose import compose_values, layer_settings, packaged_folder, register_search_path
from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError, LoraSweepError
from lorasweep.quick_imports import quick_imports
from lorasweep.results import RunResult


def run_train_app(
    arguments: Sequence[str],
    *,
    show: Callable[[RunResult], int],
    refuse: Callable[[LoraSweepError | OSError], int],
) -> list[int]:
    """Trains the run, or each run of a grid, and returns their exit codes; an empty list if Hydra only shows settings.

    Args:
        arguments: The command line after `lorasweep train`. The first may be a YAML file of settings; `--from
            SWEEP[/ARM]` takes the settings that a sweep recommends.
        show: Prints a run's result and returns its exit code.
        refuse: Prints an error and returns its exit code.

    Raises:
        ConfigError: An argument is no override, or a key or value is wrong.
        RecordError: `--from` names no sweep with recommended settings.
    """
    source, arguments = _take_source(arguments)
    file_settings: Mapping[str, Any] = {}
    origin: Mapping[str, Any] = {}
    if arguments and arguments[0].endswith((".yaml", ".yml")) and "=" not in arguments[0]:
        file_settings, arguments = read_settings_file(Path(arguments[0])), arguments[1:]
    if source is not None:
        if file_settings:
            raise ConfigError("`--from` must be used without a file of settings, but got both. Remove one of them.")
        from lorasweep.report.recommend import read_recommended  # noqa: PLC0415 (slow to import)

        file_settings, origin = read_recommended(Path(source))
    check_train_arguments(arguments, file_settings)
    register_search_path()
    codes: list[int] = []
    original_argv, is_grid = sys.argv, bool({"-m", "--multirun"} & set(arguments))

    def task(composed: Any) -> None:
        sys.argv = original_argv  # Lightning starts other processes with this command line
        try:
            codes.append(show(_train(file_settings, HydraConfig.get().overrides.task, is_grid=is_grid, origin=origin)))
        except (LoraSweepError, OSError) as error:  # Hydra would print a traceback
            codes.append(refuse(error))

    sys.argv = ["lorasweep train", *allow_new_arguments(arguments)]
    app = hydra.main(version_base="1.3", config_path=str(packaged_folder("conf").resolve()), config_name="train")
    app(task)()
    return codes


def _take_source(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the value of `--from`, which Hydra does not know, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="lorasweep train")
    parser.add_argument("--from", dest="source", metavar="SWEEP[/ARM]")
    parsed, others = parser.parse_known_args(list(arguments))
    return parsed.source, others


def _train(
    file_settings: Mapping[str, Any], overrides: Sequence[str], *, is_grid: bool, origin: Mapping[str, Any]
) -> RunResult:
    with quick_imports():
        from lorasweep import api  # noqa: PLC0415 (torch and Lightning are slow to import; `--help` needs neither)

    # Our own composition, because Hydra's would keep the default option's arguments if `_target_` names another class.
    values = compose_values("train", layer_settings("train", file_settings, parse_overrides(overrides)))
    output, resume = values.pop("output"), bool(values.pop("resume"))
    config = build(RunConfig, values)
    if is_grid and config.trainer.wants_processes:
        raise ConfigError(
            "`trainer.devices` must be 1 and `trainer.strategy` auto with `-m`, but got "
            f"{config.trainer.devices!r} and {config.trainer.strategy_name}. Use `lorasweep sweep` instead of a grid."
        )
    return api.train_config(config, output=output, resume=resume, origin=origin)
