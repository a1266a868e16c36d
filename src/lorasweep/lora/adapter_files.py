"""Reads and writes adapters as PEFT's files `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lorasweep.config.method import int_if_whole
from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError, first_line
from lorasweep.lora.fully_trained import trained_modules
from lorasweep.lora.inject import require_lora_layers
from lorasweep.lora.layer_kinds import find_fused_experts, is_conv1d
from lorasweep.lora.layers import LoraLayer, lora_layers
from lorasweep.lora.patterns import is_name_ending
from lorasweep.lora.targets import EXPERT_LAYER_NAMES

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
WEIGHT_SUFFIX = ".weight"
"""End of the names in PEFT's `target_parameters` that stand for a whole layer."""


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter's tensors by PEFT's names, such as `base_model.model.<layer>.lora_A.weight` (rank, d_in).

    The tensors share memory with the model's parameters.
    """
    named: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        named |= {f"{name}.lora_A.weight": layer.lora_a, f"{name}.lora_B.weight": layer.lora_b}
    for name, module in trained_modules(model).items():
        named |= {f"{name}.{key}": tensor for key, tensor in module.trained.state_dict().items()}
    return {f"{KEY_PREFIX}{name}": tensor.detach() for name, tensor in named.items()}


def save_adapter(model: nn.Module, folder: str | Path, *, base_path: str, base_revision: str | None = None) -> None:
    """Writes the adapter of `model`, for `load_adapter` and for PEFT. Each file is written atomically.

    Programs that load the adapter read the hub id or folder `base_path`, and `base_revision`, a commit, branch or tag.
    Raises ValueError if the model has no LoRA layers.
    """
    layers, folder = require_lora_layers(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # clones, because safetensors refuses two tensors that share memory, such as tied weights
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in lora_state(model).items()}
    config = config_to_peft(layers, model, base_path=base_path) | {"revision": base_revision}
    # weights first: if the process stops in between, a folder with a configuration still has its weights
    write_atomically(folder / WEIGHTS_FILE, save(tensors))
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Loads a saved adapter into a model that `inject_lora` adapted with the settings of the adapter.

    Raises ValueError if the model has no LoRA layers, the file is missing or damaged, or its names or shapes are not
    those of the model. The model is then unchanged.
    """
    require_lora_layers(model)
    file, expected = Path(folder) / WEIGHTS_FILE, lora_state(model)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(file)!r} must be a safetensors file, but can't be read: {error}.") from error
    for key in {**expected, **tensors}:
        shapes = [tuple(named[key].shape) if key in named else "none" for named in (expected, tensors)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{str(file)!r} must have the tensors of the adapted model, but of {key!r} the model has shape "
                f"{shapes[0]} and the file {shapes[1]}. Use the base and the settings with which it was trained."
            )
    for key, tensor in expected.items():
        tensor.copy_(tensors[key])


def read_peft_settings(path: Path) -> dict[str, Any]:
    """Returns the settings in the file of an adapter of any kind. Raises RecordError if the file is damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise RecordError(
            f"{str(path)!r} must be the settings of an adapter, but can't be read: {first_line(error)}."
        ) from error


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
