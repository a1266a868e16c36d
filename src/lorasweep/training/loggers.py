"""Builds the Lightning loggers and callbacks that a run's settings name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lorasweep.config.build import as_settings
from lorasweep.config.components import (
    Component,
    check_component,
    find_class,
    instantiate,
    list_argument_names,
)
from lorasweep.config.run import RunConfig


def start_loggers(config: RunConfig, folder: Path, *, is_first_process: bool = True) -> list[Logger]:
    """Returns a run's loggers. Lightning needs loggers on every process, but only the first process writes."""
    # Lightning reads the rank from variables of srun, even if srun did not start this process.
    if is_first_process:
        setattr(rank_zero_only, "rank", 0)  # noqa: B010 (no attribute that mypy knows)
    loggers: list[Logger] = []
    for name, component in config.logger.items():
        key = f"logger.{name}"
        run_arguments = _find_run_arguments(component, key=key, folder=folder)
        loggers.append(instantiate(component, key=key, expected=Logger, **run_arguments))  # type: ignore[type-abstract]
        if is_first_process:
            loggers[-1].log_hyperparams(as_settings(config))
    return loggers


def finish_loggers(loggers: list[Logger], *, is_failed: bool) -> None:
    """Ends the loggers, and the W&B run. Otherwise the next run of this process would be logged into the same one."""
    for logger in loggers:
        logger.finalize("failed" if is_failed else "success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _find_run_arguments(component: Component, *, key: str, folder: Path) -> dict[str, Any]:
    """Returns the arguments that name the run and its folder, if the logger's class takes them."""
    names, _ = list_argument_names(component.target, key=key)
    run_arguments = {"save_dir": str(folder), "run_name": folder.name}
    if issubclass(find_class(component.target, key=key, expected=Logger), WandbLogger):  # type: ignore[type-abstract]
        run_arguments["name"] = folder.name
    return {name: value for name, value in run_arguments.items() if name in names and name not in component.arguments}


def build_callbacks(config: RunConfig) -> list[lightning.Callback]:
    """Returns the callbacks of a run; without progress bars if `trainer.progress` is false."""
    callbacks = [
        instantiate(component, key=f"callbacks.{name}", expected=lightning.Callback)
        for name, component in config.callbacks.items()
    ]
    return [callback for callback in callbacks if config.trainer.progress or not isinstance(callback, ProgressBar)]


def check_components(config: RunConfig) -> None:
    """Refuses loggers and callbacks that can't be built, before anything is written.

    Callbacks are built for the check. Loggers are not, because some connect to a server.
    """
    for name, component in config.logger.items():
        key = f"logger.{name}"
        run_arguments = _find_run_arguments(component, key=key, folder=Path("run"))
        check_component(component, key=key, expected=Logger, **run_arguments)
    build_callbacks(config)
