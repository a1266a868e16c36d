"""Reads and writes adapters as PEFT's files `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Required

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from typing_extensions import TypedDict

from lorasweep.config.build import build
from lorasweep.config.method import (
    ALL_LINEAR_PATTERN,
    WEIGHT_SUFFIX,
    LoraConfig,
    convert_from_peft,
    int_if_whole,
    refuse_unsupported_fields,
)
from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError, first_line
from lorasweep.lora.fully_trained import match_modules_to_save, trained_modules
from lorasweep.lora.inject import check_not_injected, inject_lora, require_lora_layers
from lorasweep.lora.layer_kinds import find_fused_experts, is_conv1d
from lorasweep.lora.layers import LoraLayer, lora_layers
from lorasweep.lora.patterns import fits_pattern, is_name_ending
from lorasweep.lora.targets import EXPERT_LAYER_NAMES, find_targets, get_target_patterns, is_excluded

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FINGERPRINT_KEY = "base_fingerprint"
KEY_PREFIX = "base_model.model."
MAX_PATTERNS = Field(max_length=10_000)
"""Maximum number of patterns. Each is compared with every layer; PEFT writes at most one for each layer."""
Rank = Annotated[int, Field(ge=1, lt=2**31)]
INITS_KEEPING_BASE = (True, False, None, "gaussian", "orthogonal", "mica")
"""Values of PEFT's `init_lora_weights` that do not change the base's weights."""


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter's tensors by PEFT's names, such as `base_model.model.<layer>.lora_A.weight` (rank, d_in).

    The tensors share memory with the model's parameters.
    """
    modules = {name: module.trained for name, module in trained_modules(model).items()}
    return {key: tensor.detach() for key, tensor in _name_tensors(lora_layers(model), modules).items()}


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_path: str,
    base_fingerprint: str | None = None,
    base_revision: str | None = None,
) -> None:
    """Writes the adapter of `model`, for `load_adapter` and for PEFT. Each file is written atomically.

    Programs that load the adapter read the hub id or folder `base_path`, and `base_revision`, a commit, branch or tag.
    With `base_fingerprint`, `load_adapter` recognises a wrong base. Raises ValueError if the model has no LoRA layers.
    """
    layers, folder = require_lora_layers(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # clones, because safetensors refuses two tensors that share memory, such as tied weights
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in lora_state(model).items()}
    # at most one key, because safetensors writes several in random order, and equal adapters must give equal bytes
    metadata = None if base_fingerprint is None else {FINGERPRINT_KEY: base_fingerprint}
    config = config_to_peft(layers, model, base_path=base_path) | {"revision": base_revision}
    # weights first: if the process stops in between, a folder with a configuration still has its weights
    write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata=metadata))
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def load_adapter(model: nn.Module, folder: str | Path, *, base_fingerprint: str | None = None) -> None:
    """Puts an adapter that `save_adapter` or PEFT wrote onto a base model. The adapter can be trained further.

    `base_fingerprint` of the model's weights must equal the adapter's, if both are known.

    Raises:
        ValueError: A file is missing or broken; the adapter has a feature that lorasweep does not support; its names,
            shapes or fingerprint do not fit the model; or the model has LoRA layers. The model is then unchanged.
    """
    folder = Path(folder)
    check_not_injected(model)
    try:
        config = config_from_peft(read_peft_settings(folder / CONFIG_FILE), model)
    except (RecordError, ValueError) as error:
        raise ValueError(f"{str(folder / CONFIG_FILE)!r} must be a LoRA configuration, but got: {error}") from error
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors and torch raise errors of many classes for a damaged header
        raise ValueError(
            f"{str(folder / WEIGHTS_FILE)!r} must be a whole safetensors file, but got: {error}. Save it again."
        ) from error
    expected_fingerprint = metadata.get(FINGERPRINT_KEY)
    if None not in (expected_fingerprint, base_fingerprint) and expected_fingerprint != base_fingerprint:
        raise ValueError(
            f"The base's fingerprint must be {expected_fingerprint!r} for the adapter in {str(folder)!r}, but got "
            f"{base_fingerprint!r}. Load the base model on which the adapter was trained."
        )
    # all checks come before the first change, so that a refused model is unchanged
    targets = find_targets(model, config, allow_full_rank=True).targets
    layers = {name: LoraLayer(model.get_submodule(name), target, device="meta") for name, target in targets.items()}
    expected = _name_tensors(layers, match_modules_to_save(model, config.modules_to_save))
    _check_tensors(tensors, expected, model, folder)
    inject_lora(model, config, allow_full_rank=True, generator=torch.Generator())  # A and B are overwritten
    for key, tensor in lora_state(model).items():
        tensor.copy_(tensors[key])


def get_peft_tensors(layer: LoraLayer) -> dict[str, Tensor]:
    """Returns A and B of a layer, with PEFT's names and shapes."""
    if isinstance(layer.base, nn.Embedding):
        return {"lora_embedding_A": layer.lora_a, "lora_embedding_B": layer.lora_b}
    if isinstance(layer.base, nn.Conv2d):
        lora_a = layer.lora_a.view(-1, *layer.weight.shape[1:])
        return {"lora_A.weight": lora_a, "lora_B.weight": layer.lora_b[:, :, None, None]}
    return {"lora_A.weight": layer.lora_a, "lora_B.weight": layer.lora_b}


def _name_tensors(layers: Mapping[str, LoraLayer], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Returns the tensors of an adapter by PEFT's names."""
    named = {
        f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in get_peft_tensors(layer).items()
    }
    for name, module in modules.items():
        named |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    return {f"{KEY_PREFIX}{name}": tensor for name, tensor in named.items()}


def _check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: nn.Module, folder: Path
) -> None:
    source = f"the adapter in {str(folder)!r}"
    remedy = "Use the base model and the settings with which the adapter was trained."
    for key, expected_tensor in expected.items():
        if key not in tensors:
            raise ValueError(f"{key!r} must be in {source}, but is missing. {remedy}")
        shape, dtype = tensors[key].shape, tensors[key].dtype
        expected_shape, expected_dtype = expected_tensor.shape, expected_tensor.dtype
        if shape != expected_shape or dtype.is_floating_point is not expected_dtype.is_floating_point:
            raise ValueError(
                f"{key!r} in {source} must have shape {tuple(expected_shape)} and a dtype like {expected_dtype}, "
                f"but got {tuple(shape)} and {dtype}. {remedy}"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in sorted(set(tensors) - set(expected)):
        # PEFT also saves base weights of adapted embeddings and heads
        name, _, parameter = key.removeprefix(KEY_PREFIX).rpartition(".base_layer.")
        base, tensor = parameters.get(f"{name}.{parameter}"), tensors[key]
        if base is None or base.shape != tensor.shape or not torch.equal(tensor.to(base), base):
            raise ValueError(f"Each tensor of {source} must be in the model, but {key!r} is not. {remedy}")


class _PeftSettings(TypedDict, total=False):
    """The types of those of PEFT's settings that are read from an adapter's file. The file may have others."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    peft_type: Required[str]
    r: Rank | None
    base_model_name_or_path: str | None
    use_rslora: bool
    use_dora: bool
    rank_pattern: Annotated[dict[str, Rank], MAX_PATTERNS] | None
    alpha_pattern: Annotated[dict[str, float], MAX_PATTERNS] | None
    modules_to_save: Annotated[list[str], MAX_PATTERNS] | None
    target_parameters: Annotated[list[str], MAX_PATTERNS] | None


def read_peft_settings(path: Path) -> dict[str, Any]:
    """Returns the settings in the file of an adapter, which may be of any kind that PEFT has.

    Raises RecordError if the file is damaged, or a setting that lorasweep reads has another type.
    """
    try:
        return dict(TypeAdapter(_PeftSettings).validate_json(path.read_bytes(), strict=True))
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
        raise RecordError(f"{str(path)!r} must be the settings of an adapter, but is damaged: {reason}.") from error


def config_to_peft(layers: Mapping[str, LoraLayer], model: nn.Module, *, base_path: str) -> dict[str, Any]:
    """Returns the settings with which PEFT builds these layers in the base model at `base_path`."""
    config = next(iter(layers.values())).config
    ranks = {name: layer.rank for name, layer in layers.items()}
    # the α from which PEFT computes the layer's scaling
    alphas = {n: layer.target.alpha * (layer.rank if config.scaling == "alpha" else 1) for n, layer in layers.items()}
    # the most common values are the defaults, so that the fewest layers need a pattern
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    has_experts = bool(find_fused_experts(model))
    as_parameters = [name for name in layers if has_experts and name.rpartition(".")[2] in EXPERT_LAYER_NAMES]
    keys = {name: f"^{re.escape(name)}" + rf"(\{WEIGHT_SUFFIX})?" * (name in as_parameters) for name in layers}
    return {
        "peft_type": "LORA",
        "task_type": find_task_type(model, has_trained_modules=bool(trained_modules(model))),
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int_if_whole(alpha),
        # PEFT refuses dropout with `target_parameters`; a loaded adapter drops nothing
        "lora_dropout": 0.0 if as_parameters else config.dropout,
        "target_modules": _build_peft_targets(model, [name for name in layers if name not in as_parameters]),
        **({"target_parameters": [f"{name}{WEIGHT_SUFFIX}" for name in as_parameters]} if as_parameters else {}),
        "rank_pattern": {keys[name]: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {keys[name]: int_if_whole(a) for name, a in alphas.items() if a != alpha},
        "use_rslora": config.scaling == "alpha_over_sqrt_rank",
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
        "init_lora_weights": True,
        "modules_to_save": list(trained_modules(model)) or None,
    }


def config_from_peft(raw: Mapping[str, Any], model: nn.Module) -> LoraConfig:
    """Returns PEFT's settings (parsed JSON) as a `LoraConfig`, without patterns that match no layer of the base model.

    Raises ValueError if they are not those of LoRA, or have a key that lorasweep does not support.
    """
    refuse_unsupported_fields(raw)
    if raw.get("init_lora_weights", True) not in INITS_KEEPING_BASE:
        raise ValueError(
            f"`init_lora_weights` must not change the base's weights, but got {raw['init_lora_weights']!r}. "
            "Convert the adapter with PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    names = [name for name, _ in model.named_modules()]
    try:
        settings = convert_from_peft(raw)
        # PEFT allows patterns that match nothing, but `inject_lora` takes them for mistakes
        for key in ("rank_pattern", "alpha_pattern"):
            settings[key] = {p: settings[key][p] for p in _keep_matching_patterns(settings[key], names)}
        for key in ("exclude", "modules_to_save"):
            settings[key] = _keep_matching_patterns(settings[key], names)
        config = build(LoraConfig, settings, key="method")
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"A key is missing or has a wrong type: {error!r}. Save the adapter again.") from error
    trained = match_modules_to_save(model, config.modules_to_save)
    included = [name for name in names if not is_excluded(name, config, trained)]
    used = _keep_matching_patterns((p for p in get_target_patterns(config) if p != ALL_LINEAR_PATTERN), included)
    return replace(config, targets=used) if used else config


def _keep_matching_patterns(patterns: Iterable[str], names: list[str]) -> tuple[str, ...]:
    return tuple(pattern for pattern in patterns if any(fits_pattern(pattern, name) for name in names))


def find_task_type(model: nn.Module, *, has_trained_modules: bool) -> str | None:
    """Returns PEFT's task name of a transformers model, for `AutoPeftModelFor...`; None if there is no such name.

    A classifier without a trained module gets None, because PEFT assumes that the head of a SEQ_CLS model has trained.
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS" if has_trained_modules else None
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _build_peft_targets(model: nn.Module, layers: Collection[str]) -> list[str] | str:
    """Returns the last parts of the layers' names, or a regular expression if these parts match other layers too."""
    endings = sorted({name.rpartition(".")[2] for name in layers})
    # without names inside adapted layers and trained modules, such as `q_proj.base`
    inner = tuple(f"{name}." for name in (*layers, *trained_modules(model)))
    others = [n for n, _ in model.named_modules() if n not in layers and not f"{n}.".startswith(inner)]
    is_ambiguous = any(is_name_ending(ending, name) for name in others for ending in endings)
    return "|".join(map(re.escape, layers)) if is_ambiguous else endings
