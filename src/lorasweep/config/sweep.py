"""Settings of a sweep (`conf/sweep.yaml`). The keys of a sweep file are in `sweep/definition/sweep_file`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Tag
from pydantic.dataclasses import dataclass

from lorasweep.config.build import SETTINGS_OR_COMPONENT, NonNegative, Positive, PositiveFloat, Settings
from lorasweep.config.components import Component
from lorasweep.errors import ConfigError

MAX_CONFIRM_SEEDS = 1000
MAX_ARMS = 100
ENOUGH_SEEDS = 3
"""Number of confirm seeds below which a sweep warns, and that `--minutes` leaves: fewer leave most questions open.

A 95 % interval over seeds reaches 12.7 standard errors to each side with two seeds, 4.3 with three and 2.8 with five
(Student's t)."""
ENOUGH_TRIALS = 8
"""Number of trials of an arm that searches one key, such as full fine-tuning, with which verdicts on it hold.

In 60 replays of one task (`bench_answers.py`) 3 trials of full fine-tuning made 43 % of the verdicts on it false, 6
trials 8 % and 8 none: an arm that is tuned less well than the other one loses."""
MAX_CHOICES = 1000
"""Maximum number of choices of a swept key. Each is composed and checked, which takes milliseconds."""


@dataclass(frozen=True, kw_only=True)
class NamedSampler(Settings):
    """Sobol points alone (`qmc`), or before the points that TPE or a Gaussian process proposes from results."""

    name: Literal["tpe", "gp", "qmc"]


SamplerConfig = Annotated[
    Annotated[NamedSampler, Tag("settings")] | Annotated[Component, Tag("component")],
    SETTINGS_OR_COMPONENT,
]
"""A component is any Optuna sampler: one of Optuna or of the user."""


@dataclass(frozen=True, kw_only=True)
class LocalWorker(Settings):
    """Workers on this machine, without Ray."""

    name: Literal["local"]
    num: Positive | Literal["auto"]
    """Number of processes. On a CPU `auto` starts one for each core that the process may use, with one thread, if there
    are trials and memory for them; on a GPU one. A resumed sweep keeps its number."""
    pack_size: Positive | Literal["auto"]
    """Maximum number of trials that train together on one frozen base. 1 trains each trial alone; `auto` depends on
    the device, the lengths of rows and the number of trials left."""


@dataclass(frozen=True, kw_only=True)
class RayWorkers(Settings):
    """Workers that are Ray actors, on this machine or on a cluster."""

    name: Literal["ray"]
    num: Positive | Literal["auto"]
    """Number of workers. `auto` starts as many as fit on the cluster, and more when nodes join."""
    cpus: Positive
    """Processor cores of each process of a worker."""
    gpus: NonNegative
    """GPUs of each process of a worker. A worker has `trainer.devices` times `trainer.num_nodes` processes, which train
    each trial together."""
    address: str | None
    """Ray cluster to join: `auto` for the one on this machine, or `HOST:PORT`. Null starts a cluster on this machine
    that ends with the sweep."""
    pack_size: Positive | Literal["auto"]
    """As for `local`."""


@dataclass(frozen=True, kw_only=True)
class SlurmWorkers(Settings):
    """Workers on nodes that Slurm jobs start. Each job is one node of the sweep's own Ray cluster."""

    name: Literal["slurm"]
    jobs: Positive
    """Number of jobs, each on one machine."""
    processes_per_job: Positive
    """Maximum number of processes in each job. A worker has one process, or `trainer.devices` times
    `trainer.num_nodes` processes, which train each trial together."""
    gpus: NonNegative
    """Number of GPUs of each process."""
    cpus: Positive
    """Number of CPU cores of each process."""
    pack_size: Positive | Literal["auto"]
    """As for `local`."""
    head_ip: str | None
    """IP address at which the jobs reach the head; null uses the address that Ray finds."""
    partition: str | None
    """Partition of the jobs. Null uses the cluster's default."""
    timeout_min: Positive
    """Time limit of a job in minutes, after which Slurm ends it."""
    signal_delay_s: Positive
    """Slurm signals a job this many seconds before its time limit. The job then leaves the sweep and, if `requeue` is
    set, is requeued."""
    requeue: bool
    """Whether a job that was preempted or reached its time limit is requeued; it then joins the sweep again."""
    setup: tuple[str, ...]
    """Shell commands to run before the node starts, such as `module load cuda`."""
    extra: Mapping[str, str | int | bool]
    """Further sbatch options by their long names, such as `{account: me, mem: 64G, constraint: a100}`. They replace
    options that the other settings give."""

    def __post_init__(self) -> None:
        if self.signal_delay_s >= 60 * self.timeout_min:
            raise ConfigError(
                f"`worker.signal_delay_s < {60 * self.timeout_min}` must hold, because `worker.timeout_min` is "
                f"{self.timeout_min} minutes, but got {self.signal_delay_s!r}. Change one of them."
            )


WorkerConfig = Annotated[LocalWorker | RayWorkers | SlurmWorkers, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """Settings of the whole sweep."""

    trials: Positive | None
    """Number of trials of each arm with a space; an arm that searches one key alone gets half of them. Null keeps the
    number in the arm, or is 16. It may grow on `--resume`."""
    epochs: PositiveFloat | None
    """Epochs of a run. They set `trainer.max_steps` (60 to 900) when the sweep starts. Null, or
    `trainer.max_steps` on the command line, keeps the number of steps."""
    seed: NonNegative
    """Seed of the samplers; each arm draws from a separate random stream."""
    output: str | None
    """Folder of the sweep; null creates one in `outputs/`."""
    max_failures: Positive
    """Number of failed trials in a row after which the sweep stops, because the cause is probably not in the trials."""


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The smallest difference between two arms that matters."""

    value: float
    is_share_of_gain: bool
    """Whether the value is a share of the gain of full fine-tuning, or else of the best subject, over the frozen base.
    Else it is in the metric's unit."""


def parse_margin(setting: float | str, *, key: str = "confirm.margin") -> Margin:
    """Returns the margin of a setting such as 0.01 or `5%`. Raises ConfigError for any other kind of value."""
    text = str(setting).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = 0.0
    is_share = text.endswith("%")
    if not 0 < number < (100 if is_share else math.inf):
        raise ConfigError(
            f"`{key}` must be a positive number in the metric's unit, or a percentage of the gain over "
            f"the frozen base such as `5%`, but got {setting!r}."
        )
    return Margin(value=number / 100 if is_share else number, is_share_of_gain=is_share)


@dataclass(frozen=True, kw_only=True)
class ConfirmConfig(Settings):
    """The stage after the search: trains the chosen settings on fresh seeds, and answers the sweep's questions."""

    seeds: Annotated[int, Field(strict=True, ge=0, le=MAX_CONFIRM_SEEDS)] | tuple[Positive, ...]
    """Ascending numbers of fresh seeds at which the questions are tested, until they are settled or can't be. One
    number, 0 to 1000, trains so many in any case; 0 skips the stage, and fewer than 3 give a warning."""
    margin: float | str
    """The smallest difference between two arms that matters: a number in the metric's unit (0.01), or a percentage of
    the gain of `full`, without it of the best subject, over `frozen` on test data (5%). All verdicts use it."""
    metric: str
    """Metric of the verdicts: `auto` for `data.metric`, or the name of the score of `data.answers`."""

    def __post_init__(self) -> None:
        parse_margin(self.margin)
        looks = self.list_looks()
        is_empty = self.seeds == ()
        if is_empty or list(looks) != sorted(set(looks)) or max(looks, default=0) > MAX_CONFIRM_SEEDS:
            raise ConfigError(
                f"`confirm.seeds` must be a number, or ascending numbers of seeds up to {MAX_CONFIRM_SEEDS}, but got "
                f"{list(looks)!r}. Write, for example, `[3,6,10]`."
            )

    def list_looks(self) -> tuple[int, ...]:
        """Returns the numbers of seeds at which the questions are tested; empty without a confirm stage."""
        if isinstance(self.seeds, tuple):
            return self.seeds
        return (self.seeds,) if self.seeds else ()


@dataclass(frozen=True, kw_only=True)
class RetainConfig(Settings):
    """Data sets that measure forgetting: the confirm stage scores each run and the frozen base on their test splits."""

    data: Mapping[str, str | Mapping[str, Any]]
    """By a name of your choice: an option of the group `data`, such as `stdlib_code`, or settings of the data such as
    `{data: table, data.train: old.csv}`. Empty: nothing further is scored."""
    margin: PositiveFloat
    """How much worse than the frozen base counts as forgotten, in the unit of the data's metric."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Settings):
    """Sampler, workers and stages of a sweep."""

    sampler: SamplerConfig
    worker: WorkerConfig
    sweep: SweepSettings
    confirm: ConfirmConfig
    retain: RetainConfig
