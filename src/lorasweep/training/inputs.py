"""Loads the base model and the data of runs, once per process."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import nn

from lorasweep.config.data import DataConfig
from lorasweep.config.run import RunConfig, TrainerConfig
from lorasweep.data.batching import EvaluationSampler, count_batch_bytes
from lorasweep.data.build_splits import DataSplits, build_splits
from lorasweep.data.reading import read_source
from lorasweep.data.source import DataSource
from lorasweep.data.split import Batch, Split
from lorasweep.data.split import padding_fraction as measure_padding
from lorasweep.errors import ConfigError
from lorasweep.lora.targets import Coverage
from lorasweep.methods import METHODS
from lorasweep.models.attention import AttentionChoice, choose_attention
from lorasweep.models.load import BaseModel, Labels, load_base
from lorasweep.training.environment import DTYPES, Precision, get_device, resolve_precision
from lorasweep.training.memory import free_memory_bytes
from lorasweep.training.own_module import check_steps, load_own_base, read_own_data
from lorasweep.training.telemetry import Telemetry
from lorasweep.training.unpadded import Layout, can_unpad, drops_attention, find_layers, lay_out
from lorasweep.wording import format_bytes, join_words


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """A base model and data, in the precision and with the attention that suit the machine."""

    base: BaseModel
    splits: DataSplits
    precision: Precision
    attention: AttentionChoice | None = None
    """The choice of `model.attention=auto`; None if `model.attention` names an implementation."""
    can_unpad: bool = False
    """Whether the model can train these examples without padding."""
    telemetry: Telemetry = field(default_factory=Telemetry, compare=False)
    """Counts the seconds and tokens of this process."""

    def needs_autocast(self, config: RunConfig) -> bool:
        """Returns whether a run computes in bf16 by autocast, because its method adds fp32 weights to a bf16 base."""
        is_own = config.module is not None  # its weights stay as the module has them
        return self.precision == "bf16" and (is_own or METHODS[config.method.name].needs_autocast)

    def lightning_precision(self, config: RunConfig) -> Literal["bf16-mixed", "32-true"]:
        """Returns `precision` of a run's `lightning.Trainer`."""
        return "bf16-mixed" if self.needs_autocast(config) else "32-true"

    def autocast(self, config: RunConfig) -> torch.autocast:
        """Returns a context in which a forward pass computes as in training."""
        return torch.autocast(get_device(config.trainer).type, torch.bfloat16, enabled=self.needs_autocast(config))

    def lay_out(self, batch: Batch, settings: TrainerConfig, *, model: nn.Module, slots: int = 1) -> Layout | None:
        """Returns the layout in which `model` trains a batch without padding; None if it trains with padding."""
        is_plain = not (settings.compile or settings.is_sharded)  # both have hooks of their own
        # a block that trains in full (`modules_to_save`) is no longer a layer of the stack
        can_unpad = self.can_unpad and is_plain and find_layers(model) is not None
        return lay_out(batch, slots=slots, in_chunks=drops_attention(model)) if can_unpad else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on how the data was prepared and which attention was chosen."""
        if self.attention is None:
            return self.splits.notes
        return (*self.splits.notes, f"Attention is {self.attention.name}: {self.attention.reason}.")

    def find_coverage(self, config: RunConfig) -> Coverage | None:
        """Returns the layers that a run adapts; None if its method has no targets."""
        method = METHODS[config.method.name]
        return method.find_coverage(self.base.model, config.method, new_head_names=self.base.new_head_names)

    def list_notes(self, config: RunConfig) -> tuple[str, ...]:
        """Returns `notes`, and what share of the model a run adapts."""
        coverage = self.find_coverage(config)
        return self.notes if coverage is None else (*self.notes, coverage.describe())

    def fingerprints(self) -> dict[str, Any]:
        """Returns values that must be equal on every process of a run. A key is the setting that decides the value."""
        return {
            "model.path": self.base.fingerprint,
            "data.train": self.splits.train.fingerprint,
            "data.validation": self.splits.validation.fingerprint,
            "trainer.precision": self.precision,
            "model.attention": None if self.attention is None else self.attention.name,
        }


MAX_OWN_MODULES = 8
"""Maximum number of a user's modules, with different arguments, that a process keeps in memory."""
_USED_INPUTS: WeakValueDictionary[tuple[Any, ...], RunInputs] = WeakValueDictionary()
"""Inputs that an object of this process still refers to."""


def share_inputs(config: RunConfig) -> RunInputs:
    """Returns the inputs of a run. Loads them, unless another object of this process still uses the same inputs."""
    key = _cache_key(config)
    if (inputs := _USED_INPUTS.get(key)) is None:
        inputs = _USED_INPUTS[key] = build_inputs(config)
    return inputs


class InputsCache:
    """Loads the inputs of a worker's runs. Runs with the same model and data share one `RunInputs`."""

    def __init__(self) -> None:
        self.telemetry = Telemetry()
        self._loaded: dict[tuple[Any, ...], RunInputs] = {}
        self._other_splits: dict[tuple[DataConfig, tuple[Any, ...]], DataSplits] = {}

    def load(self, config: RunConfig) -> RunInputs:
        key = _cache_key(config)
        if key not in self._loaded:
            if config.module is not None and len(self._loaded) >= MAX_OWN_MODULES:
                self._loaded.clear()  # each value of a swept argument of the module is another base
            self._loaded[key] = build_inputs(config, telemetry=self.telemetry)
        return self._loaded[key]

    def load_splits(self, data: DataConfig, config: RunConfig) -> DataSplits:
        """Returns the splits of other data than a run's own, prepared for the run's base model.

        Raises:
            ConfigError: The data can't be read, or the model can't predict it.
        """
        key = data, _cache_key(config)
        if key not in self._other_splits:
            base = self.load(config).base
            source = read_source(data)
            splits = build_splits(data, source=source, tokenizer=base.tokenizer, model_kind=base.kind, model=base.model)
            labels, learned = _get_labels(source), base.labels and replace(base.labels, constant=())
            if labels is not None and labels != learned:
                names, found = (join_words(one.names if one else []) for one in (learned, labels))
                raise ConfigError(f"labels must be those that the model learns ({names}), but are {found}.")
            self._other_splits[key] = splits
        return self._other_splits[key]


def _cache_key(config: RunConfig) -> tuple[Any, ...]:
    trainer = config.trainer
    parts = config.model, config.data, config.module, config.datamodule, config.metric
    return *parts, resolve_precision(trainer), trainer.device


def build_inputs(config: RunConfig, *, telemetry: Telemetry | None = None) -> RunInputs:
    """Loads the base model and the data of a run. Raises `ConfigError` if they can't be loaded.

    `telemetry` counts the seconds and tokens of this process.
    """
    precision = resolve_precision(config.trainer)
    if config.module is not None:
        own_data, base = read_own_data(config), load_own_base(config)
        inputs = RunInputs(base=base, splits=own_data, precision=precision, telemetry=telemetry or Telemetry())
        check_steps(config, base, own_data, precision=inputs.lightning_precision(config))
        return inputs
    source = read_source(config.data)
    base = load_base(config.model, dtype=DTYPES[precision], labels=_get_labels(source))
    splits = build_splits(config.data, source=source, tokenizer=base.tokenizer, model_kind=base.kind, model=base.model)
    if base.labels is not None and (constant := splits.fit_constant_answer()) is not None:
        base = replace(base, labels=replace(base.labels, constant=tuple(constant.tolist())))
    attention = None
    if config.model.attention == "auto":
        attention = choose_attention(
            base.model, lengths=splits.train.lengths, device=get_device(config.trainer), dtype=DTYPES[precision]
        )
    # the shortest example, and the shortest of the longer ones if there are any
    lengths = splits.train.lengths
    shortest = int(lengths.argmin())
    longer = lengths.double().masked_fill(lengths == lengths.min(), math.inf)
    return RunInputs(
        base=base,
        splits=splits,
        precision=precision,
        attention=attention,
        can_unpad=can_unpad(base.model, splits.train.batch([shortest, int(longer.argmin())])),
        telemetry=telemetry or Telemetry(),
    )


def _get_labels(source: DataSource) -> Labels | None:
    if source.kind in ("documents", "conversations"):
        return None
    names = ("value",) if source.kind == "regression" else source.label_names
    return Labels(kind=source.kind, names=names)  # type: ignore[arg-type]


def check_batch_memory(config: TrainerConfig, split: Split) -> None:
    """Raises ConfigError if one step's examples do not fit the free memory, before anything of this size is allocated.

    Only the batch itself is counted. What the model needs for it is found by trying.
    """
    needed = count_batch_bytes(split, batch_size=config.batch_size, micro_batches=config.accumulate)
    free = free_memory_bytes()
    if needed > free:
        raise ConfigError(
            f"`trainer.batch_size` must fit the free memory of {format_bytes(free)}, but {config.batch_size} examples "
            f"take {format_bytes(needed)} or more. Training data has {len(split)} examples; use a smaller batch."
        )


def describe_batching(inputs: RunInputs, config: TrainerConfig, *, accumulate: int) -> dict[str, Any]:
    split = inputs.splits.validation
    batches = EvaluationSampler(split, batch_size=config.eval_batch_size).batches
    # `TrainingProgress.write_to` later replaces the 0
    padding = {"train": 0.0, "validation": round(measure_padding(split.lengths, batches), 4)}
    attention = None if inputs.attention is None else inputs.attention._asdict()
    return {"micro_batches": accumulate, "padding_fraction": padding, "attention": attention}
