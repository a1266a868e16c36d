"""Settings of the base model."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from lorasweep.config.build import Fraction, Settings
from lorasweep.errors import ConfigError

ModelKind = Literal["causal_lm", "classifier"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Quantization = Literal["none", "nf4"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The base model."""

    name: str
    kind: ModelKind
    """Kind of output: the next token (`causal_lm`), or labels or a number (`classifier`)."""
    path: str
    """Hub id or folder; `embedded:tiny` is inside this package."""
    revision: str | None
    """Version on the hub; a commit, branch or tag."""
    attention: Attention
    """Implementation of attention; `auto` takes eager for short rows on a CPU, else sdpa."""
    quantization: Quantization
    """How the frozen weights of linear layers are stored: `nf4` in 4 bits (QLoRA), `none` as
    `trainer.precision` says. In a sweep, arms whose method trains weights of the base get the unquantised base."""
    dropout: Fraction | None
    """Rate of every dropout of the base in training, 0 <= p < 1; null keeps the rates of the model."""
    trust_remote_code: bool
    """Whether to run Python code that comes with the model. Risk: the code runs with all your rights."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("`model.path` must name a folder or hub id, but is empty.")
