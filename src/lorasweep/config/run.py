"""Settings of one run: `RunConfig`, with one dataclass for each folder of `conf/`."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import field, fields
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import Tag
from pydantic.dataclasses import dataclass

from lorasweep.config.build import (
    SETTINGS_OR_COMPONENT,
    TARGET,
    BatchSize,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    PositiveFraction,
    Seed,
    Settings,
    as_settings,
    dotted_items,
    list_declared_types,
)
from lorasweep.config.components import Component
from lorasweep.config.data import DataConfig, Direction, ModelKind
from lorasweep.config.method import METHOD_CONFIGS, MethodConfig
from lorasweep.config.objective import AnyObjectiveConfig, ObjectiveConfig
from lorasweep.errors import ConfigError
from lorasweep.wording import join_words

Attention = Literal["auto", "sdpa", "sdpa_fp32", "eager", "flash_attention_2"]
Quantization = Literal["none", "nf4"]
StrategyName = Literal["auto", "ddp", "fsdp"]
METHODS_ON_QUANTISED_BASE = tuple(config.name for config in METHOD_CONFIGS if config.works_quantised)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The base model."""

    name: str
    kind: ModelKind
    """Kind of output: the next token (`causal_lm`), labels or a number (`classifier`), or a vector (`embedder`)."""
    path: str
    """Hub id or folder; `embedded:tiny` is inside this package."""
    revision: str | None
    """Version on the hub; a commit, branch or tag."""
    attention: Attention
    """Implementation of attention; `auto` chooses by device, dtype and dropout of attention (docs/models.md)."""
    quantization: Quantization
    """How the frozen weights of linear layers are stored: `nf4` in 4 bits (QLoRA), `none` as
    `trainer.precision` says. In a sweep, arms of other methods than `lora` and `frozen` get the unquantised base."""
    dropout: Fraction | None
    """Rate of every dropout of the base in training, 0 <= p < 1; null keeps the rates of the model."""
    trust_remote_code: bool
    """Whether to run Python code that comes with the model. Risk: the code runs with all your rights."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings(Settings):
    """Learning rates, weight decay and gradient clipping of any optimizer."""

    lr: PositiveFloat
    """Peak learning rate, > 0."""
    lr_ratio_b: PositiveFloat
    """Learning rate of B divided by the learning rate of A (LoRA+, arXiv 2402.12354); 1 is plain LoRA."""
    weight_decay: NonNegativeFloat
    """Weight decay of matrices. Vectors (biases, norms) do not decay. A class without `weight_decay` needs 0."""
    clip_norm: PositiveFloat | None
    """Maximum norm of the whole gradient; null does not clip."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(OptimSettings):
    """AdamW (Loshchilov and Hutter 2019), its learning rates, and gradient clipping."""

    name: Literal["adamw"]
    beta1: Fraction
    """Decay of the mean of the gradients, 0 <= f < 1."""
    beta2: Fraction
    """Decay of the mean of the squared gradients, 0 <= f < 1."""
    eps: NonNegativeFloat
    """Added to the root of the mean square before the division, >= 0."""


@dataclass(frozen=True, kw_only=True)
class OptimizerComponent(OptimSettings, Component):
    """An optimizer of the class `optim._target_`, which gets all keys that are not fields. Its trials run alone."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings):
    """A learning-rate schedule over `trainer.max_steps`."""

    name: Literal["linear", "cosine", "constant"]
    warmup_fraction: Fraction
    """Fraction of the steps during which the learning rate rises linearly to its peak, 0 <= f < 1."""
    min_lr_rate: Fraction = 0.0
    """Learning rate at the end over the peak, 0 <= f < 1. `constant` keeps the peak."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Settings):
    """Steps, batches, precision, device and processes of a run."""

    max_steps: Positive
    """Optimizer steps, >= 1."""
    batch_size: BatchSize
    """Sequences per optimizer step, >= 1."""
    accumulate: Positive
    """Number of micro-batches of one optimizer step, 1 to `trainer.batch_size`. Each has sequences of similar length.
    The number does not change the training, except for the draws of dropout."""
    eval_batch_size: BatchSize
    """Sequences of maximum length per evaluation batch. A batch of shorter sequences has more."""
    eval_every_steps: Positive
    """Steps between two evaluations on validation data. At an evaluation a run is checkpointed and may be stopped. By
    default at half of `trainer.max_steps` and at the end, at most 500 steps apart."""
    eval_fraction: PositiveFraction
    """Fraction of the validation examples (at least 128) on which a run is evaluated, in a random choice that is the
    same for all runs. When a run ends, its best weights are scored on all examples."""
    early_stop_evaluations: Positive | None
    """A run ends after this number of evaluations in a row without a better score; null trains all steps. The schedule
    does not become shorter."""
    activation_checkpointing: bool
    """Whether activations are recomputed in the backward pass. It needs less memory and about a third more time."""
    compile: bool
    """Whether to use `torch.compile`. Such trials run alone, because each layer of a pack is compiled again."""
    precision: Literal["auto", "bf16", "fp32"]
    """`auto` takes bf16 if the processor or GPU computes in it, else fp32."""
    device: Literal["auto", "cpu", "gpu"]
    """`auto` takes a GPU if there is one."""
    strategy: StrategyName | Component
    """Lightning's strategy. `auto` takes `ddp` for several processes, each with the whole model. `fsdp` (FSDP2) shards
    every block's weights over the processes. `_target_` sets any other strategy; such trials run alone."""
    devices: Positive | Literal["auto"]
    """Processes per node, each with one GPU or a share of the cores. `auto` is the number that torchrun or srun
    started, else the number of GPUs."""
    num_nodes: Positive
    """Number of machines on which the processes of a run are started."""
    deterministic: Literal[True, False, "strict"]
    """`true` uses torch's deterministic implementations where they exist. `strict` also ends a run at an operation
    without a deterministic implementation. `false` uses the fastest."""
    progress: bool
    """Whether a single run shows a progress bar."""

    @property
    def strategy_name(self) -> str:
        """Name of the strategy or of its class."""
        return self.strategy.name if isinstance(self.strategy, Component) else self.strategy

    @property
    def needs_process_group(self) -> bool:
        """Whether a run needs a process group, perhaps of a single process."""
        return (self.strategy, self.devices, self.num_nodes) != ("auto", 1, 1)

    @property
    def is_sharded(self) -> bool:
        """Whether the strategy is FSDP2, so that each process holds only a share of the weights."""
        return self.strategy == "fsdp"

    def __post_init__(self) -> None:
        if self.accumulate > self.batch_size:
            raise ConfigError(
                "`trainer.accumulate <= trainer.batch_size` must hold, "
                f"but got {self.accumulate!r} and {self.batch_size!r}."
            )


@dataclass(frozen=True, kw_only=True)
class ModuleComponent(Component):
    """A LightningModule of the user by `_target_`, which gets all keys that are not fields."""

    cannot: ClassVar[Mapping[str, str]] = {
        "packs": "A LightningModule of your own (`module._target_`) has its own steps, which slots can't share.",
        "retains": "Your own LightningModule scores its own data alone.",
        "exports": "Your own LightningModule is no model of transformers. Use the weights in `best/` of the run.",
    }
    """Why it lacks a capability of `Capabilities`."""
    lr_argument: str | None = None
    """The argument that gets `optim.lr`. Needed if the module has its own `configure_optimizers`."""
    new_modules: tuple[str, ...] = ()
    """Names of modules that are not pre-trained, such as `classifier`. Each run draws their weights with `seeds.init`,
    and every method except `frozen` trains them."""


@dataclass(frozen=True, kw_only=True)
class LoggedMetric(Settings):
    """The score of `module`."""

    name: str | None = None
    """The name that `validation_step` logs, such as `val_acc`; `test_step` must then log `test_acc`."""
    direction: Direction | None = None
    """Whether a lower or a higher value is better."""


@dataclass(frozen=True, kw_only=True)
class SeedsConfig(Settings):
    """A seed for each source of randomness, so that users can change a single one."""

    init: Seed
    """Seed of the initial values of adapters and new heads."""
    data_order: Seed
    """Seed of the order of the training examples."""
    dropout: Seed
    """Seed of the dropout masks."""


SEED_KEYS = ("seed", *(f"seeds.{f.name}" for f in fields(SeedsConfig)))
"""The settings that together decide the initial values, the data order and the dropout of a run."""
STEPS_KEY = "trainer.max_steps"
LR, RANK, ALPHA, SCALING = "optim.lr", "method.rank", "method.alpha", "method.scaling"
"""Dotted keys of the settings of LoRA that a sweep is about."""
MIN_STEPS = 60
"""Runs of fewer steps are short, because a learning rate has no time to show whether it is good: the search stops none
of them, `sweep.epochs` sets no fewer, and a longer run is advised before more trials and seeds."""


def follows_rate_law(method: str, optimizer: str) -> bool:
    """Returns whether the rate law (`encoding.RateLaw`) was measured for a method and an optimizer: LoRA under Adam.

    `optimizer` is a name or a class. Other optimizers move the weights by the size of the gradient, so the reason for
    the law does not hold for them.
    """
    return method == "lora" and "adam" in optimizer.lower()


Capability: TypeAlias = Literal[True] | str
"""True, or sentences that say why not and which setting would change that."""


class Capabilities(NamedTuple):
    """Capabilities of runs with these settings. A loaded model may lack some of them.

    They train together on one frozen base (`packs`), are scored on `retain.data` (`retains`), and become a model of
    transformers or an adapter of PEFT (`exports`).
    """

    packs: Capability
    retains: Capability
    exports: Capability


SOLO_CALLBACKS: Mapping[str, str] = {
    "EarlyStopping": "would end all runs of a pack by the score of one. Use `trainer.early_stop_evaluations`.",
    "ModelCheckpoint": "would save all runs of a pack by the score of one. The best weights of a run are in `best/`.",
    "OnExceptionCheckpoint": "would save all runs of a pack. A run resumes from its last evaluation without it.",
}
"""For Lightning's callbacks that can't share a pack: why."""
NEEDED_BY_PACKS: Mapping[str, Callable[[RunConfig], bool]] = {
    "trainer.compile=false": lambda config: not config.trainer.compile,
    "trainer.strategy=auto": lambda config: not isinstance(config.trainer.strategy, Component),
    "schedule=cosine": lambda config: not isinstance(config.schedule, Component),
}
"""For each setting in the message about packs: whether a run has it, or another value that packs can train too."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """All settings of one run."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    optim: Annotated[
        Annotated[OptimConfig, Tag("settings")] | Annotated[OptimizerComponent, Tag("component")], SETTINGS_OR_COMPONENT
    ]
    schedule: Annotated[
        Annotated[ScheduleConfig, Tag("settings")] | Annotated[Component, Tag("component")], SETTINGS_OR_COMPONENT
    ]
    """A `Component` is any scheduler of torch; its trials run alone."""
    trainer: TrainerConfig
    logger: Mapping[str, Component] = field(hash=False, default_factory=dict)
    """Lightning loggers by name. They get every metric that `steps.jsonl` has."""
    callbacks: Mapping[str, Component] = field(hash=False, default_factory=dict)
    """Lightning callbacks by name. In a pack they see all slots. Trials with early stopping or checkpoints of Lightning
    run alone."""
    seed: Seed
    """Default of every seed in `seeds`."""
    seeds: SeedsConfig

    objective: AnyObjectiveConfig = field(default_factory=ObjectiveConfig)
    module: ModuleComponent | None = None
    """The user's own LightningModule, instead of `model`, `data` and lorasweep's module."""
    datamodule: Component | None = None
    """The LightningDataModule of `module`."""
    metric: LoggedMetric = field(default_factory=LoggedMetric)
    """The score of `module`."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; 0 under `method=frozen`, which trains nothing."""
        return 0 if self.method.trains_nothing else self.trainer.max_steps

    @property
    def follows_rate_law(self) -> bool:
        return follows_rate_law(self.method.name, self.optim.name)

    @property
    def eval_fraction(self) -> float:
        """`trainer.eval_fraction`, or 1 if the evaluations of a run are the user's own."""
        return 1.0 if self.module is not None else self.trainer.eval_fraction

    @property
    def loaded(self) -> tuple[Any, ...]:
        """The settings that decide which base and which data a run loads."""
        return self.model, self.data, self.module, self.datamodule, self.metric

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the run. Packing, `retain.data` and export read them."""
        method = self.method.name
        cannot: dict[str, Any] = {
            "packs": self._explain_packs(),
            "exports": self.method.trains_nothing and f"`method={method}` trains nothing. Use {self.model.path!r}.",
        }
        if self.module is not None:
            cannot = {**cannot, **self.module.cannot, **({} if self.method.packs else {"packs": cannot["packs"]})}
        return Capabilities(**{name: cannot.get(name) or True for name in Capabilities._fields})

    def _explain_packs(self) -> str:
        """Returns why the run trains alone; empty if it can share a pack."""
        if not self.method.packs:  # no other setting would change that
            return f"`method={self.method.name}` trains alone; only `method=lora` shares packs."
        needed = [f"`{override}`" for override, holds in NEEDED_BY_PACKS.items() if not holds(self)]
        sentences = [f"Packs need {join_words(needed)}."] if needed else []
        named = {f"`callbacks.{key}`": SOLO_CALLBACKS.get(callback.name) for key, callback in self.callbacks.items()}
        return " ".join([*sentences, *(f"{key} {why}" for key, why in named.items() if why)])

    def _find_unsharded(self) -> str | None:
        """Returns the key of a setting that needs whole weights on each process; None if there is none."""
        needs_whole = {
            "model.quantization": self.model.quantization != "none",
            "method": not (self.method.has_rank or self.method.trains_all),
            "trainer.compile": self.trainer.compile,
        }
        return next((key for key, is_needed in needs_whole.items() if is_needed), None)

    def __post_init__(self) -> None:
        self._check_own_module()
        if self.optim.lr_ratio_b != 1 and not self.method.has_rank:
            raise ConfigError(
                f"`optim.lr_ratio_b` must be 1 unless `method=lora`, but got {self.optim.lr_ratio_b!r} "
                f"with `method={self.method.name}`, where it has no effect."
            )
        if self.model.quantization != "none" and not self.method.works_quantised:
            raise ConfigError(
                f"`model.quantization` must be none with `method={self.method.name}`, which needs weights of the base, "
                f"but got {self.model.quantization!r}. Use `method=lora`, or in a sweep set it once for all arms."
            )
        cuts = {
            "accumulate": self.trainer.accumulate,
            "devices": self.trainer.devices,
            "num_nodes": self.trainer.num_nodes,
        }
        if self.data.needs_whole_batch and (cut := next((key for key, number in cuts.items() if number != 1), None)):
            raise ConfigError(
                f"`trainer.{cut}` must be 1 with `data={self.data.name}`, because the examples of a batch are each "
                f"other's negatives, so that a batch can't be cut, but got {cuts[cut]!r}. For less memory use "
                "`trainer.activation_checkpointing=true`."
            )
        if self.trainer.is_sharded and (key := self._find_unsharded()):
            raise ConfigError(
                f"`trainer.strategy` must be ddp with this value of `{key}`, because no process has whole weights "
                f"otherwise, but got {self.trainer.strategy_name!r}."
            )

    def _check_own_module(self) -> None:
        needed = {
            "datamodule._target_": self.datamodule,
            "metric.name": self.metric.name,
            "metric.direction": self.metric.direction,
        }
        for key, value in needed.items():
            if (value is None) is not (self.module is None):
                raise ConfigError(f"`module._target_`, your own LightningModule, and `{key}` must be set together.")
        if self.module is None:
            return
        has_no_effect = {
            "model": self.model.name != "module",
            "data": self.data.name != "module",
            "model.quantization": self.model.quantization != "none",
            "model.dropout": self.model.dropout is not None,
            "trainer.accumulate": self.trainer.accumulate != 1,
            "trainer.compile": self.trainer.compile,
            "trainer.activation_checkpointing": self.trainer.activation_checkpointing,
            "trainer.devices": self.trainer.needs_process_group,
        }
        for key in (key for key, is_set in has_no_effect.items() if is_set):
            raise ConfigError(
                f"`{key}` has no effect on your own LightningModule (`module._target_`). Remove it: the module, the "
                "data module or their arguments decide."
            )


def require_exportable(config: RunConfig) -> None:
    """Raises ConfigError if a run has no model of transformers and no adapter of PEFT."""
    if (why := config.capabilities.exports) is not True:
        raise ConfigError(f"a run must be a trained model of transformers to be exported. {why}")


def refuse_code(
    config: RunConfig,
    *,
    groups: Container[str] = ("model", "module"),
    remedy: str = "add `--trust` to the command, or `trust=True` in Python",
) -> None:
    """Refuses recorded settings that name code which would run, because whoever wrote the record may be unknown.

    One rule for all commands: to train is to run what the settings name; to read a record is not.
    `groups` are the settings whose code runs: those of the model, and in a Trainer of the user also those of the data.
    """
    for key, value in dotted_items(as_settings(config)):
        if value and key.partition(".")[0] in groups and key.endswith((TARGET, "trust_remote_code")):
            raise ConfigError(
                f"`{key}` of a recorded run must not name code, but got {value!r}: only commands that train run it. If "
                f"you trust the author, {remedy}."
            )


DECLARED_TYPES: Mapping[str, frozenset[Any]] = {
    key: frozenset(kind for _, kind in pairs)
    for key, pairs in groupby(sorted(list_declared_types(RunConfig), key=itemgetter(0)), itemgetter(0))
}
"""The types of each setting of a run by dotted key. Arguments of other packages' classes are missing."""
