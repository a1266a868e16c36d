"""Settings of each method: what is trained. One dataclass per file in `conf/method/`, keyed by `method.name`.

`lorasweep.lora.LoraConfig` is the class below, so that a setting is described once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lorasweep.errors import ConfigError

Scaling = Literal["alpha_over_rank", "alpha_over_sqrt_rank"]
Init = Literal["default", "gaussian", "pissa", "orthogonal"]
Variant = Literal["lora", "dora"]
TrainedBias = Literal["none", "lora_only", "all"]
TrainedVectors = Literal["biases", "biases_and_norms"]
IntrinsicForm = Literal["did", "said"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): h = W0 x + scaling · B A x.

    The defaults are those of `conf/method/lora.yaml`, for use without Hydra. A pattern names layers: by a name or its
    ending after a dot (`q_proj`, `mlp.up_proj`), or by a regular expression after `re:` that must match the whole name.
    """

    name: Literal["lora"] = "lora"
    rank: int = 8
    """Rank r of the change, >= 1."""
    alpha: float = 16.0
    """Strength α of the change, >= 0. 0 gives the base model."""
    scaling: Scaling = "alpha_over_rank"
    """Factor on the change: α/r (LoRA, section 4.1) or α/√r (rsLoRA, arXiv 2312.03732)."""
    targets: str | tuple[str, ...] = "all-linear"
    """Layers that get a change: `all-linear` (every linear layer but the output head) or patterns. After a name,
    brackets choose rows of a fused projection: `c_attn[q,v]` (of three equal parts q, k, v) or
    `qkv[0:64,96:128]`; each part gets its own A and B."""
    dropout: float = 0.0
    """Probability of dropping an input of A, 0 <= p < 1."""
    init: Init = "default"
    """How A and B start. `default`: A uniform, B zero (LoRA's code); `gaussian`: A normal with deviation 1/r, B zero;
    `orthogonal`: both random, B A = 0, rank even; `pissa`: the layer's principal part trains (arXiv 2404.02948)."""
    variant: Variant = "lora"
    """`dora` also trains the length of each row of the weight (arXiv 2402.09353)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Rank of the layers that a pattern matches, instead of `rank`; the first pattern that matches counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Strength of the layers that a pattern matches, instead of `alpha`; the first pattern that matches counts."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that get no change although `targets` match them."""
    layers: tuple[int, ...] = ()
    """Indices of the blocks that get a change (the first number in a layer's name); empty for all."""
    modules_to_save: tuple[str, ...] = ()
    """Patterns of modules (heads, embeddings) that train in full, on a copy in fp32, and are saved with the adapter."""
    bias: TrainedBias = "none"
    """Biases that train, on copies: `none`, `lora_only` (those of the adapted layers) or `all` of the model."""

    def __post_init__(self) -> None:
        """Refuses values out of range and settings that have no effect or do not go together."""
        for key, choices in (("scaling", Scaling), ("init", Init), ("variant", Variant), ("bias", TrainedBias)):
            if getattr(self, key) not in get_args(choices):
                raise ConfigError(f"`method.{key}` must be one of {get_args(choices)}, but got {getattr(self, key)!r}.")
        for rank in (self.rank, *self.rank_pattern.values()):
            self._check_rank(rank)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            self._check_alpha(alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`0 <= method.dropout < 1` must hold, but got {self.dropout!r}.")
        if not self.targets:
            raise ConfigError("`method.targets` must name at least one layer, but got none. Use `all-linear`.")
        for index in self.layers:
            if _is_no_int(index) or index < 0:
                raise ConfigError(f"`method.layers` must be indices >= 0, but got {index!r}.")

    def _check_rank(self, rank: int) -> None:
        if _is_no_int(rank) or rank < 1:
            raise ConfigError(f"`method.rank >= 1` must hold, but got {rank!r}. Use `method=frozen` to train nothing.")
        if self.init == "orthogonal" and rank % 2:
            raise ConfigError(f"`method.rank` must be even with `method.init=orthogonal`, but got {rank!r}.")

    def _check_alpha(self, alpha: float) -> None:
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ConfigError(f"`method.alpha` must be a finite number >= 0, but got {alpha!r}.")
        if self.init == "pissa" and alpha == 0:
            raise ConfigError(
                "`method.alpha > 0` must hold with `method.init=pissa`, but got 0. Use another `method.init`."
            )


def _is_no_int(value: Any) -> bool:
    return not isinstance(value, int) or isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Settings of full fine-tuning: every weight trains, in fp32."""

    name: Literal["full"] = "full"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Settings of training the output head alone."""

    name: Literal["head"] = "head"


@dataclass(frozen=True, kw_only=True)
class BitfitConfig:
    """Settings of training the biases alone (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    name: Literal["bitfit"] = "bitfit"
    train: TrainedVectors = "biases"
    """`biases_and_norms` also trains the weights of norms, which is all there is in a model without biases."""


@dataclass(frozen=True, kw_only=True)
class IntrinsicConfig:
    """Settings of training a few numbers that are projected at random into all weights (arXiv 2012.13255)."""

    name: Literal["intrinsic"] = "intrinsic"
    dim: int = 200
    """Numbers d that train, >= 1; under `said` the layers' scales are among them."""
    form: IntrinsicForm = "said"
    """`did`: one projection for all weights (section 3); `said`: with a scale per layer that trains too (section 4)."""

    def __post_init__(self) -> None:
        """Refuses a dimension out of range."""
        if _is_no_int(self.dim) or self.dim < 1:
            raise ConfigError(
                f"`method.dim >= 1` must hold, but got {self.dim!r}. Use `method=frozen` to train nothing."
            )


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """Settings of the base model as it is: nothing trains (the α/r = 0 row)."""

    name: Literal["frozen"] = "frozen"


MethodConfig = LoraConfig | FullConfig | HeadConfig | BitfitConfig | IntrinsicConfig | FrozenConfig
