"""Settings of a sweep: how it is driven (`conf/sweep.yaml`), and the form of a file in `sweeps/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorasweep.config.limits import check_worker, require_at_least, require_at_most
from lorasweep.config.slurm import SlurmWorkers
from lorasweep.errors import ConfigError

MOST_SEEDS = 1000
MOST_TRIALS = 1_000_000
"""Of one arm."""
LONGEST_NAME = 100
CONFIRM_ENDING = "-confirm"
"""Between an arm's name and a number in the folder names of the confirm stage."""


@dataclass(frozen=True, kw_only=True)
class ModelBasedSampler:
    """Sobol points first; then TPE or a Gaussian process chooses, from what has ended and what runs."""

    name: Literal["tpe", "gp"]
    startup_trials: int | None
    """Sobol points of an arm before the model chooses; null: half of the arm's trials, at most 32."""

    def __post_init__(self) -> None:
        if self.startup_trials is not None:
            require_at_least("sampler.startup_trials", self.startup_trials, 1)


@dataclass(frozen=True, kw_only=True)
class FixedSampler:
    """Sobol points, random points, or every combination once: learns nothing."""

    name: Literal["qmc", "random", "grid"]


@dataclass(frozen=True, kw_only=True)
class RungPruner:
    """Successive halving (ASHA, arXiv 1810.05934) or Hyperband (arXiv 1603.06560)."""

    name: Literal["successive_halving", "hyperband"]
    min_steps: int
    """Optimizer steps of the first rung."""
    reduction_factor: int
    """One in so many goes on at each rung."""

    def __post_init__(self) -> None:
        require_at_least("pruner.min_steps", self.min_steps, 1)
        require_at_least("pruner.reduction_factor", self.reduction_factor, 2)


@dataclass(frozen=True, kw_only=True)
class MedianPruner:
    """Ends a trial that is worse than the median of earlier trials at the same step."""

    name: Literal["median"]
    startup_trials: int
    min_steps: int

    def __post_init__(self) -> None:
        require_at_least("pruner.startup_trials", self.startup_trials, 1)
        require_at_least("pruner.min_steps", self.min_steps, 0)


@dataclass(frozen=True, kw_only=True)
class NoPruner:
    """Every trial runs to its end."""

    name: Literal["none"]


SamplerConfig = ModelBasedSampler | FixedSampler
PrunerConfig = RungPruner | MedianPruner | NoPruner


@dataclass(frozen=True, kw_only=True)
class JournalStorage:
    """The studies are a file in the sweep's folder: for any number of workers on one machine."""

    name: Literal["journal"]


@dataclass(frozen=True, kw_only=True)
class DatabaseStorage:
    """The studies are in a database, where workers of many machines meet."""

    name: Literal["postgresql", "mysql"]
    url: str | None
    """`postgresql://USER@HOST/DATABASE`; null takes it from the environment variable LORASWEEP_STORAGE_URL. A password
    in it is used and never written down."""
    retry_s: float
    """Seconds that a worker waits for a database that does not answer, before it stops."""

    def __post_init__(self) -> None:
        require_at_least("storage.retry_s", self.retry_s, 0)


StorageConfig = JournalStorage | DatabaseStorage


@dataclass(frozen=True, kw_only=True)
class LocalWorkers:
    """Processes on this machine, one per GPU or per group of processor cores."""

    name: Literal["local"]
    num: int | Literal["auto"]
    """Worker processes; `auto` starts one per GPU, without a GPU one. A single one is this process itself."""
    pack_size: int | Literal["auto"]
    """Most trials that train together on one frozen base; `auto` measures, 1 trains each alone."""
    lease_s: float
    """A worker on another machine that gave no sign of life for so many seconds is taken for lost: its trials are gone
    on with elsewhere."""

    def __post_init__(self) -> None:
        if self.num != "auto":
            require_at_least("worker.num", self.num, 1)
        check_worker(pack_size=self.pack_size, lease_s=self.lease_s)


WorkerConfig = LocalWorkers | SlurmWorkers


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What holds for the whole sweep."""

    trials: int | None
    """Trials of every arm that has a space; None leaves each arm's own number."""
    seed: int
    """The sampler's seed; each arm draws from its own stream."""
    output: str | None
    max_failures: int
    """So many failed trials in a row stop the sweep: then it is not the trials that are wrong."""

    def __post_init__(self) -> None:
        if self.trials is not None:
            require_at_least("sweep.trials", self.trials, 1)
        require_at_least("sweep.seed", self.seed, 0)
        require_at_least("sweep.max_failures", self.max_failures, 1)


@dataclass(frozen=True, kw_only=True)
class ConfirmConfig:
    """The stage after the search: each arm's best configuration again on fresh seeds, scored once on test data."""

    seeds: int
    """Number of fresh seeds, 0 to 1000; 0 leaves the stage out."""

    def __post_init__(self) -> None:
        require_at_least("confirm.seeds", self.seeds, 0)
        require_at_most("confirm.seeds", self.seeds, MOST_SEEDS)


@dataclass(frozen=True, kw_only=True)
class DriverConfig:
    """How a sweep is driven."""

    sampler: SamplerConfig
    pruner: PrunerConfig
    storage: StorageConfig
    worker: WorkerConfig
    sweep: SweepSettings
    confirm: ConfirmConfig


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One arm as its sweep file states it."""

    name: str
    settings: Mapping[str, Any]
    """Dotted keys and values of this arm, over those of the whole sweep."""
    space: Mapping[str, Any]
    """Swept keys: a list of choices, or a mapping `low`, `high`, and `log` or `step`."""
    trials: int
    expand: Mapping[str, list[Any]] = field(default_factory=dict)
    """Keys and their values: one arm for each combination, with its own search and the same budget."""
    expanded_from: str | None = None
    """The arm whose `expand` made this one."""
    expanded: Mapping[str, Any] = field(default_factory=dict)
    """Its own values of the expanded keys."""

    def __post_init__(self) -> None:
        require_at_least(f"arms.{self.name}.trials", self.trials, 1)
        require_at_most(f"arms.{self.name}.trials", self.trials, MOST_TRIALS)
        _require_folder_name("an arm's name", self.name)
        if self.name.endswith(CONFIRM_ENDING):
            raise ConfigError(
                f"an arm's name must not end in `{CONFIRM_ENDING}`, which names the runs of the confirm stage, "
                f"but got {self.name!r}."
            )
        if not self.space and self.trials != 1:
            raise ConfigError(
                f"`arms.{self.name}.trials` must be 1 for an arm without a space, "
                f"but got {self.trials!r}. Add a `space`."
            )


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """One file of `sweeps/`."""

    name: str
    description: str
    settings: Mapping[str, Any]
    """Dotted keys and values of every arm and of the driver."""
    arms: tuple[ArmConfig, ...]

    def __post_init__(self) -> None:
        _require_folder_name("`name`", self.name)


def _require_folder_name(what: str, name: str) -> None:
    if len(name) > LONGEST_NAME:
        raise ConfigError(f"{what} must have at most {LONGEST_NAME} characters, but got {name!r}.")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"{what} must consist of letters, digits, `_` and `-`, but got {name!r}.")
