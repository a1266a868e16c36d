"""What a run has loaded: a base model and data, in the precision and with the attention that suit the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from lorasweep.config.build import as_settings
from lorasweep.config.components import find_own_files
from lorasweep.config.data import SplitSettings
from lorasweep.config.run import RunConfig
from lorasweep.data.rows import Splits, describe_lost
from lorasweep.errors import ConfigError
from lorasweep.lora.targets import Coverage
from lorasweep.methods import bind
from lorasweep.models.attention import AttentionChoice
from lorasweep.models.load import BaseModel
from lorasweep.record import compute_sha256
from lorasweep.tasks.splits import DataSplits
from lorasweep.training.environment import Precision, get_device
from lorasweep.training.reference import add_reference
from lorasweep.wording import Note


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """A base model and data, loaded."""

    base: BaseModel
    splits: Splits
    precision: Precision
    always_autocasts: bool = False
    """Whether a run in bf16 computes by autocast whatever its method, because the base stays in fp32."""
    attention: AttentionChoice | None = None
    """The choice of `model.attention=auto`; None if `model.attention` names an implementation."""

    @property
    def data(self) -> DataSplits:
        """The splits of a workload with an objective."""
        assert isinstance(self.splits, DataSplits)
        return self.splits

    @property
    def max_positions(self) -> int | None:
        """Maximum number of tokens of an example that the model can read; None if it has no limit."""
        positions: int | None = getattr(getattr(self.base.model, "config", None), "max_position_embeddings", None)
        return positions

    def describe_lost(self, config: RunConfig, *, has_test: bool) -> list[Note]:
        """Returns a note on what `data.max_length` cuts off (`data.rows.describe_lost`)."""
        splits = self.splits.train, self.splits.validation, *([self.splits.test()] if has_test else [])
        return describe_lost(splits, is_longest=config.data.max_tokens == self.max_positions)

    def prepare(self, config: RunConfig, *, folder: Path | None) -> RunInputs:
        """Returns inputs for training, whose splits have the reference if the objective needs one (`add_reference`)."""
        if not isinstance(self.splits, DataSplits):
            return self
        names = "train", "validation"
        splits = add_reference(self.splits, base=self.base, trainer=config.trainer, folder=folder, names=names)
        return self if splits is self.splits else replace(self, splits=splits)

    def needs_autocast(self, config: RunConfig) -> bool:
        """Returns whether a run computes in bf16 by autocast, because some of its weights are in fp32."""
        return self.precision == "bf16" and (self.always_autocasts or bind(config.method).needs_autocast)

    def lightning_precision(self, config: RunConfig) -> Literal["bf16-mixed", "32-true"]:
        """Returns `precision` of a run's `lightning.Trainer`."""
        return "bf16-mixed" if self.needs_autocast(config) else "32-true"

    def autocast(self, config: RunConfig) -> torch.autocast:
        """Returns a context in which a forward pass computes as in training."""
        return torch.autocast(get_device(config.trainer).type, torch.bfloat16, enabled=self.needs_autocast(config))

    def find_coverage(self, config: RunConfig) -> Coverage | None:
        """Returns the layers that a run adapts; None if its method has no targets."""
        return bind(config.method).find_coverage(self.base.model, new_head_names=self.base.new_head_names)

    def list_notes(self, config: RunConfig, *, has_test: bool = False) -> list[Note]:
        """Returns notes on the prepared data, on the chosen attention, and on the layers that a run adapts."""
        attention, coverage = self.attention, self.find_coverage(config)
        chosen = [] if attention is None else [f"Attention is {attention.name}: {attention.reason}."]
        return [
            *(Note(kind="data", text=text) for text in (*self.splits.notes, *chosen)),
            *self.describe_lost(config, has_test=has_test),
            *([] if coverage is None else [coverage.note]),
        ]

    def fingerprints(self, config: RunConfig) -> dict[str, str]:
        """Returns digests of base, training and validation data, chat template and the user's code, by setting."""
        template = self.splits.train.describe().get("template")
        files = find_own_files(as_settings(config))
        return {
            "model.path" if config.module is None else "module": self.base.fingerprint,
            "data.train": self.splits.train.fingerprint,
            "data.validation": self.splits.validation.fingerprint,
            **({} if template is None else {"data.template": template}),
            **{f"{key} ({file.name})": compute_sha256(file)[:16] for key, file in files.items()},
        }


def require_same_fingerprints(
    recorded: Mapping[str, str], now: Mapping[str, str], *, config: RunConfig, kind: Literal["run", "sweep"]
) -> None:
    """Raises ConfigError if a recorded fingerprint of a run or a sweep differs from the present one."""
    data = config.data
    # a split that the user did not set is taken from `data.train`
    sources = {}
    if isinstance(data, SplitSettings):
        sources = {f"data.{name}": data.sources.get(name, data.train) for name in ("train", "validation", "test")}
    for key, value in recorded.items():
        if now.get(key) != value:
            of_source = f", read from {sources[key]!r}," if key in sources else ""
            raise ConfigError(
                f"`{key}`{of_source} must be as when the {kind} began (fingerprint {value!r}), but got "
                f"{now.get(key)!r}. Restore it, or start a new {kind}."
            )
