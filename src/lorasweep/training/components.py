"""Loggers, callbacks and profilers that settings name by `_target_`, as Lightning's users know them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar, ThroughputMonitor
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lorasweep.config.build import as_settings
from lorasweep.config.components import Component, argument_names, check_component, find_class, instantiate
from lorasweep.config.run import RunConfig
from lorasweep.data.split import Batch
from lorasweep.errors import ConfigError

PROFILERS: Mapping[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
"""Lightning's profilers by the names that its Trainer takes."""
EVENT_LOGGER = "lorasweep.training.components.EventLogger"
"""Import path of the logger that every run has by default; it writes into the run's folder and nowhere else."""
LOGGER_PACKAGES: Mapping[str, str] = {
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "NeptuneLogger": "neptune",
}
"""Packages that Lightning's loggers need and that the user installs, by the logger's class."""


class EventLogger(TensorBoardLogger):
    """TensorBoard's event file in a run's own folder, without Lightning's `hparams.yaml` beside it.

    The row of the HParams tab, with the score, is written when the run has ended.
    """

    def __init__(self, save_dir: str, **arguments: Any) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False, **arguments)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: the row of the HParams tab is written at the end of the run."""

    @rank_zero_only
    def save(self) -> None:
        """Writes the events in memory to the file."""
        if self._experiment is not None:
            self._experiment.flush()


class Throughput(ThroughputMonitor):
    """Lightning's `ThroughputMonitor`, which counts the examples and the tokens (without padding) of our batches."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(batch_size_fn=_count_examples, length_fn=_count_tokens, **arguments)
        self._module_has_flops = False  # our module has no FLOPs count, and Lightning would warn


def _count_examples(batch: Batch) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def _count_tokens(batch: Batch) -> int:
    return int(batch["num_tokens"])


@contextmanager
def open_loggers(config: RunConfig, folder: Path, *, is_first: bool) -> Iterator[list[Logger]]:
    """Opens a run's loggers, which write into its folder, and finishes them at the end of the block.

    Lightning expects loggers on every process of a run, but only those of the first write.
    """
    loggers = start_loggers(config, folder, is_first=is_first)
    try:
        yield loggers
    finally:
        if is_first:
            finish_loggers(loggers)


def start_loggers(config: RunConfig, folder: Path, *, is_first: bool = True) -> list[Logger]:
    """Returns a run's loggers. On its first process they log the run's settings.

    Raises:
        ConfigError: A class is not trusted, not there or no logger, or refuses its arguments.
    """
    if is_first:  # Lightning takes the rank from variables of srun, where this process may be no rank of a run
        setattr(rank_zero_only, "rank", 0)  # noqa: B010 (no attribute that mypy knows)
    loggers: list[Logger] = []
    for name, component in config.logger.items():
        key = f"logger.{name}"
        offered = _run_arguments(component, key=key, folder=folder)
        loggers.append(instantiate(component, key=key, expected=Logger, **offered))  # type: ignore[type-abstract]
        if is_first:
            loggers[-1].log_hyperparams(as_settings(config))
    return loggers


def finish_loggers(loggers: list[Logger]) -> None:
    """Ends the run of each logger that would otherwise log the next run of this process as the same one (W&B)."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _run_arguments(component: Component, *, key: str, folder: Path) -> dict[str, Any]:
    """Returns the arguments that name the run and its folder, as far as the logger's class takes them.

    Raises:
        ConfigError: The settings name another folder.
    """
    names, _ = argument_names(component.target, key=key)
    if "save_dir" in component.arguments:
        raise ConfigError(
            f"`{key}.save_dir` must be left out, because each run logs into its own folder, but got "
            f"{component.arguments['save_dir']!r}."
        )
    offered = {"save_dir": str(folder), "run_name": folder.name}
    if issubclass(find_class(component.target, key=key, expected=Logger), WandbLogger):  # type: ignore[type-abstract]
        offered["name"] = folder.name
    return {name: value for name, value in offered.items() if name in names and name not in component.arguments}


def build_callbacks(config: RunConfig) -> list[lightning.Callback]:
    """Returns the callbacks of a run; progress bars only where `trainer.progress` asks for one.

    Raises:
        ConfigError: A class is not trusted, not there or no callback, or refuses its arguments.
    """
    built = [
        instantiate(component, key=f"callbacks.{name}", expected=lightning.Callback)
        for name, component in config.callbacks.items()
    ]
    return [one for one in built if config.trainer.progress or not isinstance(one, ProgressBar)]


def build_profiler(config: RunConfig, folder: Path) -> Profiler | None:
    """Returns a run's profiler, which writes into the run's folder; None where it has none.

    Raises:
        ConfigError: A class is not trusted, not there or no profiler, or refuses its arguments.
    """
    named = config.trainer.profiler
    if named is None:
        return None
    place: dict[str, Any] = {"dirpath": str(folder), "filename": "profile"}
    if not isinstance(named, Component):
        return PROFILERS[named](**place)
    taken = argument_names(named.target, key="trainer.profiler")[0]
    place = {name: value for name, value in place.items() if name in taken}
    return instantiate(named, key="trainer.profiler", expected=Profiler, **place)  # type: ignore[type-abstract]


def check_components(config: RunConfig) -> None:
    """Checks, before anything is written, that a run's loggers, callbacks and profiler can be built.

    Callbacks and profilers are built for the check. Loggers are not, because some connect to a server.

    Raises:
        ConfigError: One can't be built.
    """
    for name, component in config.logger.items():
        key = f"logger.{name}"
        offered = _run_arguments(component, key=key, folder=Path("run"))
        check_component(component, key=key, expected=Logger, **offered)
        package = LOGGER_PACKAGES.get(component.name)
        if package is not None and find_spec(package) is None:
            raise ConfigError(
                f"`{key}` needs the package {package!r}, which is not installed. Run `pip install {package}`."
            )
    build_callbacks(config)
    build_profiler(config, Path("run"))
