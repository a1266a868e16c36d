"""Settings of each method, with one dataclass per file in `conf/method/`.

`lorasweep.lora.LoraConfig` is the class below, so that each setting is described once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from lorasweep.config.build import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Rank,
    Settings,
    build,
    flatten,
)
from lorasweep.errors import ConfigError
from lorasweep.wording import join_words

ALL_LINEAR_PATTERN = "all-linear"
REGEX_PREFIX = "re:"
WEIGHT_SUFFIX = ".weight"
"""End of the names in PEFT's `target_parameters` that stand for a whole layer."""
PLAIN_NAME = re.compile(r"\w+(\.\w+)*")
"""A layer's name or its end. It matches the same layers, whether it is read as a name or as a regular expression."""
INITS: Mapping[Any, str] = {True: "default", "gaussian": "gaussian", "orthogonal": "orthogonal"}
"""`LoraConfig.init` for each value of PEFT's `init_lora_weights`."""
# fmt: off
CONVERTED_FIELDS = frozenset({
    "r", "lora_alpha", "use_rslora", "target_modules", "lora_dropout", "init_lora_weights", "rank_pattern",
    "alpha_pattern", "exclude_modules", "layers_to_transform", "modules_to_save", "target_parameters",
})
"""Fields of PEFT's `LoraConfig` that `convert_from_peft` and `read_peft_config` read."""
FIELDS_WITHOUT_EFFECT = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size",
})
# fmt: on
"""Fields of PEFT's `LoraConfig` that say where an adapter belongs, follow from the model (`fan_in_fan_out`), or act
only with another field that is refused. All other fields must be empty."""
Scaling = Literal["alpha_over_rank", "alpha_over_sqrt_rank", "alpha"]
Init = Literal["default", "gaussian", "orthogonal"]
TrainedVectors = Literal["biases", "biases_and_norms"]


def scaling_factor(*, alpha: float, rank: int, rule: Scaling) -> float:
    """Returns the factor of B A x: α/r (LoRA, arXiv 2106.09685, section 4.1), α/√r (rsLoRA, arXiv 2312.03732) or α."""
    return alpha / {"alpha_over_rank": rank, "alpha_over_sqrt_rank": math.sqrt(rank), "alpha": 1}[rule]


class MethodSettings(Settings):
    """Settings of a method."""

    packs: ClassVar[bool] = False
    """Whether runs can train together in slots."""
    trains_nothing: ClassVar[bool] = False
    """Whether a run is the base model as it is: it does no step, and its score is that of every seed."""


JOIN_NAMES = BeforeValidator(lambda pattern: flatten(pattern) if isinstance(pattern, Mapping) else pattern)
"""Makes dotted names of nested names of layers: `method.rank_pattern.mlp.up_proj=4` is typed without quotes."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(MethodSettings):
    """Settings of low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): h = W0 x + scaling · B A x.

    The defaults equal `conf/method/lora.yaml`, for use without Hydra. A pattern is the name of a layer, the end of a
    name after a dot (`q_proj`, `mlp.up_proj`), or `re:` and a regular expression that must match the whole name.
    """

    packs: ClassVar[bool] = True

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
    init: Init = "default"
    """Initial values of A and B. `default`: A uniform, B zero (LoRA's code); `gaussian`: A normal with deviation 1/r, B
    zero; `orthogonal`: both random, B A = 0, rank even."""
    rank_pattern: Annotated[Mapping[str, Rank], JOIN_NAMES] = field(default_factory=dict, hash=False)
    """Rank of the layers that a pattern matches, instead of `rank`; the first pattern that matches counts."""
    alpha_pattern: Annotated[Mapping[str, NonNegativeFloat], JOIN_NAMES] = field(default_factory=dict, hash=False)
    """Strength of the layers that a pattern matches, instead of `alpha`; the first pattern that matches counts."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers that get no update although `targets` match them."""
    layers: tuple[NonNegative, ...] = ()
    """Indices of the blocks that get an update (the first number in a layer's name); empty for all."""
    modules_to_save: tuple[str, ...] = ()
    """Patterns of modules (heads, embeddings) that train in full, on a copy in fp32, and are saved with the adapter."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("`method.targets` must name at least one layer, but got none. Use `all-linear`.")
        for rank in (self.rank, *self.rank_pattern.values()):
            if self.init == "orthogonal" and rank % 2:
                raise ConfigError(f"`method.rank` must be even with `method.init=orthogonal`, but got {rank!r}.")

    @classmethod
    def from_peft(cls, peft_config: Any) -> LoraConfig:
        """Returns the settings of a `peft.LoraConfig`. Raises ConfigError if our layers can't do a field of it."""
        return build(cls, read_peft_config(peft_config), key="method")


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodSettings):
    """Settings of full fine-tuning: every weight trains, in fp32."""

    name: Literal["full"] = "full"


@dataclass(frozen=True, kw_only=True)
class HeadConfig(MethodSettings):
    """Settings of training only the output head."""

    name: Literal["head"] = "head"


@dataclass(frozen=True, kw_only=True)
class BitfitConfig(MethodSettings):
    """Settings of training only the biases (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    name: Literal["bitfit"] = "bitfit"
    train: TrainedVectors = "biases"
    """`biases_and_norms` also trains the weights of norms; a model without biases needs it."""


@dataclass(frozen=True, kw_only=True)
class IntrinsicConfig(MethodSettings):
    """Settings of training a few parameters that are projected at random into all weights (arXiv 2012.13255)."""

    name: Literal["intrinsic"] = "intrinsic"
    dim: Positive = 200
    """Number d of trained parameters, >= 1. One of them for each layer is its scale ("SAID", section 4)."""


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(MethodSettings):
    """Settings of the base model without any training (the same as α/r = 0)."""

    trains_nothing = True
    name: Literal["frozen"] = "frozen"


@dataclass(frozen=True, kw_only=True)
class PeftConfig(MethodSettings):
    """Settings of an adapter that the package PEFT makes (extra `peft`). Its trials run alone."""

    name: Literal["peft"] = "peft"
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """`peft_type`, such as VERA or IA3, and the settings of PEFT's configuration of that type."""


MethodConfig = Annotated[
    LoraConfig | FullConfig | HeadConfig | BitfitConfig | IntrinsicConfig | FrozenConfig | PeftConfig,
    Field(discriminator="name"),
]


def read_peft_config(peft_config: Any) -> dict[str, Any]:
    """Returns the fields of our `LoraConfig` from a `peft.LoraConfig`; errors as in `LoraConfig.from_peft`."""
    values = peft_config.to_dict()
    init = values.get("init_lora_weights")
    is_known = isinstance(init, str) or init is True  # 1 == True, but is no setting
    ours = INITS.get(init) if is_known else None
    refuse_unsupported_fields(
        values, unsupported=() if ours or "init_lora_weights" not in values else ("init_lora_weights",)
    )
    if not values["target_modules"]:
        raise ConfigError(
            f"`target_modules` must name layers, but got {values['target_modules']!r}, which leaves the choice "
            "to PEFT. Use `all-linear`, or a list of names."
        )
    return convert_from_peft(values) | {"init": ours}


def refuse_unsupported_fields(values: Mapping[str, Any], *, unsupported: Iterable[str] = ()) -> None:
    """Raises ConfigError if PEFT's settings are not those of LoRA, or have fields that lorasweep's layers can't do.

    If lorasweep ignored such a field, the model would compute other outputs. `unsupported` has the names of further
    fields to refuse.
    """
    kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
    if kind != "LORA":
        raise ConfigError(
            f"`peft_type` must be LORA, but got {kind!r}. "
            f"Train it with `method=peft method.config={{peft_type: {kind}}}`."
        )
    known = CONVERTED_FIELDS | FIELDS_WITHOUT_EFFECT
    # PEFT's defaults of all other fields are empty, except the text "none" of `bias`
    refused = [name for name, value in values.items() if name not in known and value and value != "none"]
    if not all(name.endswith(WEIGHT_SUFFIX) for name in values.get("target_parameters") or ()):
        refused.append("target_parameters")  # fused experts
    if named := [*refused, *unsupported]:
        given = join_words([f"`{name}` {values[name]!r}" for name in named])
        raise ConfigError(
            f"PEFT's settings must have only fields that lorasweep's LoRA layers can do, but got {given}. Use the "
            "default, or train it with `method=peft`."
        )


def convert_from_peft(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of our `LoraConfig` from PEFT's settings, except `init`.

    Raises KeyError, TypeError or AttributeError if a setting is missing or of another type.
    """
    layers, targets = raw.get("layers_to_transform"), raw["target_modules"]
    if parameters := raw.get("target_parameters"):
        targets = [*_list_patterns(targets or ()), *(name.removesuffix(WEIGHT_SUFFIX) for name in parameters)]
    return {
        "rank": raw["r"],
        "alpha": float(raw["lora_alpha"]),
        "scaling": "alpha_over_sqrt_rank" if raw.get("use_rslora") else "alpha_over_rank",
        "targets": targets if isinstance(targets, str) else tuple(sorted(targets)),
        "dropout": float(raw.get("lora_dropout", 0.0)),
        "rank_pattern": {_convert_key(key): rank for key, rank in (raw.get("rank_pattern") or {}).items()},
        "alpha_pattern": {_convert_key(key): alpha for key, alpha in (raw.get("alpha_pattern") or {}).items()},
        "exclude": _list_patterns(raw.get("exclude_modules") or ()),
        "layers": (layers,) if isinstance(layers, int) else tuple(layers or ()),
        "modules_to_save": tuple(raw.get("modules_to_save") or ()),
    }


def int_if_whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _list_patterns(modules: str | Iterable[str]) -> tuple[str, ...]:
    """Returns PEFT's list of names, or its string with a regular expression, as patterns."""
    return (f"{REGEX_PREFIX}{modules}",) if isinstance(modules, str) else tuple(sorted(modules))


def _convert_key(key: str) -> str:
    """Converts a key of PEFT's rank or alpha pattern. PEFT compares the key with the end of a layer's name."""
    return key if PLAIN_NAME.fullmatch(key) else rf"{REGEX_PREFIX}(.*\.)?({key})"
