"""What runs on one base model and data set share: both, loaded once, in the precision and attention of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from lorasweep.config.method import LoraConfig
from lorasweep.config.run import RunConfig, TrainerConfig
from lorasweep.data.batching import EvaluationSampler
from lorasweep.data.read_source import read_source
from lorasweep.data.source import DataSource
from lorasweep.data.split import padding_fraction as measure_padding
from lorasweep.data.splits import DataSplits, load_splits
from lorasweep.models.attention import AttentionChoice, choose_attention
from lorasweep.models.load import BaseModel, Labels, load_base
from lorasweep.training.environment import DTYPES, Precision, device_of, resolve_precision
from lorasweep.training.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What runs on one base model and data set share; loaded once per worker."""

    base: BaseModel
    splits: DataSplits
    precision: Precision
    attention: AttentionChoice | None = None
    """What the rule of `model.attention=auto` chose; None where `model.attention` says which."""
    telemetry: Telemetry = field(default_factory=Telemetry, compare=False)
    """What the time of the process that has it goes to."""

    def whole_base(self, config: RunConfig) -> BaseModel:
        """Returns the base with its weights in memory, also where each process of a run holds a share only."""
        if self.base.files is None:
            return self.base
        return load_base(config.model, dtype=DTYPES[self.precision], labels=self.base.labels)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on how the data was made and which attention was chosen."""
        if self.attention is None or self.attention.name == "own":
            return self.splits.notes
        return (*self.splits.notes, f"Attention is {self.attention.name}: {self.attention.reason}.")

    def fingerprints(self) -> dict[str, Any]:
        """Returns what must be the same for every process of a run, by the setting that it comes from."""
        return {
            "model.path": self.base.fingerprint,
            "data.train": self.splits.train.fingerprint,
            "data.validation": self.splits.validation.fingerprint,
            "trainer.precision": self.precision,
            "model.attention": None if self.attention is None else self.attention.name,
        }


_SHARED: WeakValueDictionary[tuple[Any, ...], RunInputs] = WeakValueDictionary()


def share_inputs(config: RunConfig) -> RunInputs:
    """Returns base model and data of these settings: those that somebody in this process still holds, else new ones."""
    key = _what_is_loaded(config)
    if (inputs := _SHARED.get(key)) is None:
        inputs = _SHARED[key] = build_inputs(config)
    return inputs


def _what_is_loaded(config: RunConfig) -> tuple[Any, ...]:
    trainer = config.trainer
    return config.model, config.data, resolve_precision(trainer), trainer.device, _stays_in_files(config)


class InputsCache:
    """Base models and data by the settings that decide them, each loaded once."""

    def __init__(self) -> None:
        self.telemetry = Telemetry()
        self._loaded: dict[tuple[Any, ...], RunInputs] = {}

    def of(self, config: RunConfig) -> RunInputs:
        """Returns the inputs of a run, loaded if no earlier run needed it."""
        key = _what_is_loaded(config)
        if key not in self._loaded:
            with self.telemetry.phase("loading"):
                self._loaded[key] = build_inputs(config, telemetry=self.telemetry)
        return self._loaded[key]


def build_inputs(config: RunConfig, *, telemetry: Telemetry | None = None) -> RunInputs:
    """Loads the base model and the data of a run.

    Args:
        config: The run's settings.
        telemetry: The clock of this process, where it has one.

    Raises:
        ConfigError: The model or data cannot be had; nothing was written.
    """
    precision = resolve_precision(config.trainer)
    source = read_source(config.data)
    dtype = DTYPES[precision]
    base = load_base(config.model, dtype=dtype, labels=labels_of(source), on_meta=_stays_in_files(config))
    splits = load_splits(
        config.data,
        source=source,
        tokenizer=base.tokenizer,
        model_kind=base.kind,
        start_token=getattr(getattr(base.model, "config", None), "decoder_start_token_id", None),
    )
    attention = None
    if config.model.attention == "auto":
        attention = choose_attention(base.model, lengths=splits.train.lengths, device=device_of(config.trainer))
    return RunInputs(
        base=base, splits=splits, precision=precision, attention=attention, telemetry=telemetry or Telemetry()
    )


def _stays_in_files(config: RunConfig) -> bool:
    """Whether each process reads no more than its share of the base's weights; not where a start is computed of all."""
    method = config.method
    needs_all = isinstance(method, LoraConfig) and (method.init == "pissa" or method.variant == "dora")
    return config.trainer.is_sharded and not needs_all


def labels_of(source: DataSource) -> Labels | None:
    """Returns what a classifier of these rows is to tell; None for rows without labels."""
    if source.kind in ("documents", "conversations"):
        return None
    names = ("value",) if source.kind == "regression" else source.label_names
    return Labels(kind=source.kind, names=names)  # type: ignore[arg-type]


def describe_batching(
    inputs: RunInputs, config: TrainerConfig, *, accumulate: int, padding_fraction: float
) -> dict[str, Any]:
    """Returns what a run record keeps of how its batches are made."""
    held_out = inputs.splits.validation
    batches = EvaluationSampler(held_out, batch_size=config.eval_batch_size).batches
    return {
        "micro_batches": accumulate,
        "padding_fraction": {
            "train": round(padding_fraction, 4),
            "validation": round(measure_padding(held_out.lengths, batches), 4),
        },
        "attention": None if inputs.attention is None else inputs.attention._asdict(),
    }
