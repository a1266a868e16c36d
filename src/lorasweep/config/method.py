"""Settings of each method, with one dataclass per file in `conf/method/`.

`lorasweep.lora.LoraConfig` is the class below, so that each setting is described once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from lorasweep.config.build import (
    Fraction,
    NonNegativeFloat,
    Positive,
    Rank,
    Settings,
    flatten,
)
from lorasweep.errors import ConfigError

ALL_LINEAR_PATTERN = "all-linear"
REGEX_PREFIX = "re:"
Scaling = Literal["alpha_over_rank", "alpha_over_sqrt_rank", "alpha"]
ALL_PARAMETERS = ".*"
"""The value of `method.parameters` with which every weight trains."""


def scaling_factor(*, alpha: float, rank: int, rule: Scaling) -> float:
    """Returns the factor of B A x: α/r (LoRA, arXiv 2106.09685, section 4.1), α/√r (rsLoRA, arXiv 2312.03732) or α."""
    return alpha / {"alpha_over_rank": rank, "alpha_over_sqrt_rank": math.sqrt(rank), "alpha": 1}[rule]


class MethodSettings(Settings):
    """Settings of a method."""

    packs: ClassVar[bool] = False
    """Whether runs can train together in slots."""
    has_rank: ClassVar[bool] = False
    """Whether A and B of a rank train, which stay whole on each process if the base is sharded."""
    works_quantised: ClassVar[bool] = False
    """Whether the base may be quantised. Other methods train its weights, or need them unquantised."""
    trains_nothing: ClassVar[bool] = False
    """Whether a run is the base model as it is: it does no step, and its score is that of every seed."""
    name: str

    @property
    def trains_all(self) -> bool:
        """Whether every weight of the base trains."""
        return False

    @property
    def scale(self) -> float:
        """The factor on B A; 0 without a rank."""
        return 0.0

    @property
    def adapter_kind(self) -> str | None:
        """The kind of the adapter of PEFT that a run keeps; None if it keeps other weights."""
        return None

    @property
    def kind(self) -> str:
        """The method's name in a sweep's record. A run of `full` that trains some parameters alone is `partial`."""
        return self.name


JOIN_NAMES = BeforeValidator(lambda pattern: flatten(pattern) if isinstance(pattern, Mapping) else pattern)
"""Makes dotted names of nested names of layers: `method.rank_pattern.mlp.up_proj=4` is typed without quotes."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(MethodSettings):
    """Settings of low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): h = W0 x + scaling · B A x.

    The defaults equal `conf/method/lora.yaml`, for use without Hydra. A pattern is the name of a layer, the end of a
    name after a dot (`q_proj`, `mlp.up_proj`), or `re:` and a regular expression that must match the whole name.
    """

    packs = has_rank = works_quantised = True
    adapter_kind = "LoRA"

    name: Literal["lora"] = "lora"
    rank: Rank = 8
    """Rank r of the weight update B A, >= 1."""
    alpha: NonNegativeFloat = 16.0
    """Strength α of the update, >= 0. With 0 the model equals the base model."""
    scaling: Scaling = "alpha_over_rank"
    """Factor on the update: α/r (LoRA, section 4.1), α/√r (rsLoRA, arXiv 2312.03732), or `alpha` itself."""
    targets: str | tuple[str, ...] = "all-linear"
    """Layers that get an update: `all-linear` (every linear layer but the output head), a regular expression for the
    whole name of a layer, as in PEFT, or a list of patterns."""
    dropout: Fraction = 0.0
    """Probability of dropping an input of A, 0 <= p < 1."""
    rank_pattern: Annotated[Mapping[str, Rank], JOIN_NAMES] = field(default_factory=dict, hash=False)
    """Rank of the layers that a pattern matches, instead of `rank`; the first pattern that matches counts."""
    alpha_pattern: Annotated[Mapping[str, NonNegativeFloat], JOIN_NAMES] = field(default_factory=dict, hash=False)
    """Strength of the layers that a pattern matches, instead of `alpha`; the first pattern that matches counts."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that get no update although `targets` match them."""
    modules_to_save: tuple[str, ...] = ()
    """Patterns of modules (heads, embeddings) that train in full, on a copy in fp32, and are saved with the adapter."""

    @property
    def scale(self) -> float:
        return scaling_factor(alpha=self.alpha, rank=self.rank, rule=self.scaling)

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("`method.targets` must name at least one layer, but got none. Use `all-linear`.")


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodSettings):
    """Settings of full fine-tuning: weights train themselves, in fp32."""

    name: Literal["full"] = "full"
    parameters: str = ALL_PARAMETERS
    """Regular expression for the whole names of the parameters that train, such as `.*bias`; `.*` is all. A new head
    always trains."""

    @property
    def trains_all(self) -> bool:
        return self.parameters == ALL_PARAMETERS

    @property
    def kind(self) -> str:
        return self.name if self.trains_all else "partial"


@dataclass(frozen=True, kw_only=True)
class IntrinsicConfig(MethodSettings):
    """Settings of training a few parameters that are projected at random into all weights (arXiv 2012.13255)."""

    name: Literal["intrinsic"] = "intrinsic"
    dim: Positive = 200
    """Number d of trained parameters, >= 1. One of them for each layer is its scale ("SAID", section 4)."""


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(MethodSettings):
    """Settings of the base model without any training (the same as α/r = 0)."""

    works_quantised = trains_nothing = True
    name: Literal["frozen"] = "frozen"


@dataclass(frozen=True, kw_only=True)
class PeftConfig(MethodSettings):
    """Settings of an adapter that the package PEFT makes (extra `peft`). Its trials run alone."""

    name: Literal["peft"] = "peft"
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """`peft_type`, such as VERA or IA3, and the settings of PEFT's configuration of that type."""

    @property
    def adapter_kind(self) -> str:
        return str(self.config.get("peft_type"))


MethodConfig = Annotated[
    LoraConfig | FullConfig | IntrinsicConfig | FrozenConfig | PeftConfig,
    Field(discriminator="name"),
]
METHOD_CONFIGS: tuple[type[MethodSettings], ...] = get_args(get_args(MethodConfig)[0])


def int_if_whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
