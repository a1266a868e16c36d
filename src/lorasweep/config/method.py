"""Settings of each method: what is trained. One dataclass per file in `conf/method/`, keyed by `method.name`.

`lorasweep.lora.LoraConfig` is the class below, so that a setting is described once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lorasweep.errors import ConfigError

Scaling = Literal["alpha_over_rank", "alpha_over_sqrt_rank"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): h = W0 x + scaling · B A x.

    The defaults are those of `conf/method/lora.yaml`, for use without Hydra.
    """

    name: Literal["lora"] = "lora"
    rank: int = 8
    """Rank r of the change, >= 1."""
    alpha: float = 16.0
    """Strength α of the change, >= 0. 0 gives the base model."""
    scaling: Scaling = "alpha_over_rank"
    """Factor on the change: α/r (LoRA, section 4.1) or α/√r (rsLoRA, arXiv 2312.03732)."""
    targets: str | tuple[str, ...] = "all-linear"
    """Layers that get a change: `all-linear` (every linear layer but the output head), names or name endings
    (`q_proj`, `mlp.up_proj`), or a regular expression after `re:` that must match the whole name."""
    dropout: float = 0.0
    """Probability of dropping an input of A, 0 <= p < 1."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"`method.rank >= 1` must hold, but got {self.rank!r}. Use `method=frozen` to train nothing.")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ConfigError(f"`method.alpha` must be a finite number >= 0, but got {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`0 <= method.dropout < 1` must hold, but got {self.dropout!r}.")
        if not self.targets:
            raise ConfigError("`method.targets` must name at least one layer, but got none. Use `all-linear`.")


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Settings of full fine-tuning: every weight trains, in fp32."""

    name: Literal["full"] = "full"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Settings of training the output head alone."""

    name: Literal["head"] = "head"


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """Settings of the base model as it is: nothing trains (the α/r = 0 row)."""

    name: Literal["frozen"] = "frozen"


MethodConfig = LoraConfig | FullConfig | HeadConfig | FrozenConfig
