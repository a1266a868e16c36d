"""Settings of a sweep: how it is driven (`conf/sweep.yaml`), and the form of a file in `sweeps/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorasweep.config.limits import require_at_least, require_at_most, require_fraction
from lorasweep.config.slurm import SlurmConfig
from lorasweep.config.targets import Component
from lorasweep.errors import ConfigError
from lorasweep.redaction import redact

MAX_SEEDS = 1000
MAX_TRIALS = 1_000_000
"""Of one arm."""
MAX_NAME_LENGTH = 100
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
class HalvingPruner:
    """Promotion-type successive halving (arXiv 1810.05934, algorithm 2): the best part of a rung goes on."""

    name: Literal["halving"]
    rungs: tuple[float, ...]
    """Where trials are compared, as fractions of a run, ascending. Each is moved to the nearest evaluation."""
    reduction_factor: int
    """At each rung one in so many trials goes on."""
    min_survivors: int
    """Trials that go on beyond each rung at least, once no more can come."""
    criterion: Literal["loss", "metric"]
    """What trials are compared by at a rung: the sweep's metric, which picks the winner, or the validation loss."""

    def __post_init__(self) -> None:
        _check_rungs(self.rungs)
        require_at_least("pruner.reduction_factor", self.reduction_factor, 2)
        require_at_least("pruner.min_survivors", self.min_survivors, 1)


@dataclass(frozen=True, kw_only=True)
class MedianPruner:
    """A trial goes on where it is no worse than the median of all trials at the same step, running ones included."""

    name: Literal["median"]
    min_fraction: float
    """Fraction of a run before which nothing is compared; after it every evaluation is a rung."""
    min_trials: int
    """Trials that must have reached a step before one of them goes on beyond it."""
    criterion: Literal["loss", "metric"]
    """As for `halving`."""

    def __post_init__(self) -> None:
        require_fraction("pruner.min_fraction", self.min_fraction)
        require_at_least("pruner.min_trials", self.min_trials, 1)


@dataclass(frozen=True, kw_only=True)
class NoPruner:
    """Every trial runs to its end."""

    name: Literal["none"]


SamplerConfig = ModelBasedSampler | FixedSampler | Component
"""A component is a sampler of Optuna's, of OptunaHub's or of the user's own."""
PrunerConfig = HalvingPruner | MedianPruner | NoPruner | Component
"""A component is a pruner of Optuna's or of the user's own."""


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Where the sweep's Optuna studies are kept."""

    url: str | None
    """A database as SQLAlchemy writes it (`postgresql+psycopg://HOST/DATABASE`); null is a journal file in the sweep's
    folder. A password is refused, because the record keeps the address."""

    def __post_init__(self) -> None:
        if self.url is not None and redact(self.url) != self.url:
            raise ConfigError(
                f"`storage.url` must have no user or password before an `@`, which a record never keeps, but got "
                f"{redact(self.url)!r}. Write the user as `?user=NAME`, and give the password where the database's own "
                "client looks for it, such as PGPASSWORD or ~/.pgpass."
            )


@dataclass(frozen=True, kw_only=True)
class LocalWorker:
    """One worker in the process that was started, which also has the controller."""

    name: Literal["local"]
    num: int
    """Workers. More than one need `worker=ray`."""
    pack_size: int | Literal["auto"]
    """Most trials that train together on one frozen base; `auto` follows from memory and the trials left, 1 trains each
    alone."""

    def __post_init__(self) -> None:
        if self.num != 1:
            raise ConfigError(
                f"`worker.num` must be 1 with `worker=local`, but got {self.num!r}. For several workers "
                f"use `worker=ray worker.num={self.num}`."
            )
        _check_pack_size(self.pack_size)


@dataclass(frozen=True, kw_only=True)
class RayWorkers:
    """Workers that are Ray actors, on this machine or on a cluster."""

    name: Literal["ray"]
    num: int | Literal["auto"]
    """Workers; `auto` takes as many as fit on the cluster, and more when nodes join."""
    cpus: int
    """Processor cores of each process of a worker."""
    gpus: int
    """GPUs of each process of a worker. A worker has one process, or as many as `trainer.devices` times
    `trainer.num_nodes`, which train each trial together."""
    address: str | None
    """A Ray cluster to join: `auto` for the one of this machine, or `HOST:PORT`. Null starts one on this machine, which
    ends with the sweep."""
    pack_size: int | Literal["auto"]
    """As for `local`."""

    def __post_init__(self) -> None:
        if self.num != "auto":
            require_at_least("worker.num", self.num, 1)
        require_at_least("worker.cpus", self.cpus, 1)
        require_at_least("worker.gpus", self.gpus, 0)
        _check_pack_size(self.pack_size)


def _check_pack_size(size: int | Literal["auto"]) -> None:
    if size != "auto":
        require_at_least("worker.pack_size", size, 1)


WorkerConfig = LocalWorker | RayWorkers | SlurmConfig


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
        require_at_most("confirm.seeds", self.seeds, MAX_SEEDS)


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
        require_at_most(f"arms.{self.name}.trials", self.trials, MAX_TRIALS)
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
    if len(name) > MAX_NAME_LENGTH:
        raise ConfigError(f"{what} must have at most {MAX_NAME_LENGTH} characters, but got {name!r}.")
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(f"{what} must consist of letters, digits, `_` and `-`, but got {name!r}.")


def _check_rungs(rungs: tuple[float, ...]) -> None:
    if not rungs or list(rungs) != sorted(set(rungs)) or not all(0 < rung < 1 for rung in rungs):
        raise ConfigError(
            f"`pruner.rungs` must be ascending fractions of a run, each more than 0 and less than 1, but got "
            f"{list(rungs)!r}. A rung at or beyond the last step compares nothing that could still go on."
        )
