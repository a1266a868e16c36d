"""Reads and writes adapters as PEFT's files `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig, TrainedBias
from lorasweep.disk import require_regular_file, write_atomically
from lorasweep.lora.fully_trained import find_trained_biases, get_bias_owner, match_modules_to_save, trained_modules
from lorasweep.lora.functional import scaling_factor
from lorasweep.lora.inject import inject_lora
from lorasweep.lora.layers import LoraLayer, lora_layers
from lorasweep.lora.merge import check_merged, require_lora_layers
from lorasweep.lora.peft_format import KEY_PREFIX, config_from_peft, config_to_peft, get_peft_tensors, load_peft_tensors
from lorasweep.lora.targets import get_pattern_value, plan_targets

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FINGERPRINT_KEY = "base_fingerprint"
MAX_CONFIG_BYTES = 2**24
"""Maximum size of `adapter_config.json` in bytes. A pattern for each of 100,000 layers fits."""


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter's tensors by PEFT's names, such as `base_model.model.<layer>.lora_A.weight` (rank, d_in).

    The tensors share memory with the model's parameters, except computed ones (PiSSA, parts of fused projections).
    """
    layers, modules = lora_layers(model), {name: module.trained for name, module in trained_modules(model).items()}
    biases = find_trained_biases(model, _get_bias_setting(layers), layers, modules)
    return {key: tensor.detach() for key, tensor in _name_tensors(layers, modules, biases).items()}


def load_lora_state(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Sets the adapter's values from tensors with the names and shapes of `lora_state`.

    Args:
        model: A model with LoRA layers.
        tensors: The new values.
        source: Where the tensors come from, for error messages.

    Raises:
        ValueError: A name or shape differs. The model is then unchanged.
    """
    _check_tensors(tensors, lora_state(model), model, source)
    state = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}
    layers, modules = lora_layers(model), trained_modules(model)
    for name, layer in layers.items():
        load_peft_tensors(layer, {key: state[f"{name}.{key}"] for key in get_peft_tensors(layer)})
    for name, module in modules.items():
        module.trained.load_state_dict({key: state[f"{name}.{key}"] for key in module.trained.state_dict()})
    for name, bias in find_trained_biases(model, _get_bias_setting(layers), layers, modules).items():
        bias.data.copy_(state[_build_bias_key(name, layers)])


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_path: str,
    base_fingerprint: str | None = None,
    base_revision: str | None = None,
) -> None:
    """Writes the adapter of `model`, for `load_adapter` and for PEFT. Each file is written atomically.

    Args:
        model: A model with LoRA layers. The base's weights are not written.
        folder: Created if missing.
        base_path: Hub id or folder of the base model, for programs that load the adapter.
        base_fingerprint: Fingerprint of the base's weights, with which `load_adapter` recognises a wrong base.
        base_revision: The base's commit, branch or tag on the hub.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    layers, folder = require_lora_layers(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # clones, because safetensors refuses two tensors that share memory, such as tied weights
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in lora_state(model).items()}
    metadata = {"format": "pt"} | ({} if base_fingerprint is None else {FINGERPRINT_KEY: base_fingerprint})
    config = config_to_peft(layers, model, base_path=base_path) | {"revision": base_revision}
    # weights first: if the process stops in between, a folder with a configuration still has its weights
    write_atomically(folder / WEIGHTS_FILE, serialise(tensors, metadata=metadata))
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def serialise(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a safetensors file. Equal tensors and metadata give equal bytes."""
    content = save(dict(tensors), metadata=dict(metadata))
    # safetensors writes the metadata in random order, so the header is replaced by one in sorted order. Its length is a
    # multiple of 8, so that the data stays aligned.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = text + b" " * (-len(text) % 8)
    return len(padded).to_bytes(8, "little") + padded + content[8 + length :]


def load_adapter(model: nn.Module, folder: str | Path, *, base_fingerprint: str | None = None) -> None:
    """Loads an adapter that `save_adapter` or PEFT wrote onto `model`. The adapter can be trained further.

    The files contain PiSSA as a plain LoRA of twice the rank, and parts of a fused projection as one plain LoRA. A base
    model gets these plain LoRA layers. A model that already has LoRA layers with the settings of the saved model keeps
    PiSSA and the parts.

    Args:
        model: The base model, or a model with LoRA layers of the same names and ranks, whose values are overwritten.
        folder: Contains `adapter_config.json` and `adapter_model.safetensors`.
        base_fingerprint: Fingerprint of `model`'s base weights. It must equal the adapter's, if both are known.

    Raises:
        ValueError: A file is missing or broken; the adapter has a feature that lorasweep does not support; its names,
            shapes or fingerprint do not fit the model; or the model is merged. The model is then unchanged.
    """
    folder = Path(folder)
    source = f"the adapter in {str(folder)!r}"
    config = _read_config(folder / CONFIG_FILE, model)
    tensors, metadata = _read_tensors(folder / WEIGHTS_FILE)
    expected_fingerprint = metadata.get(FINGERPRINT_KEY)
    if None not in (expected_fingerprint, base_fingerprint) and expected_fingerprint != base_fingerprint:
        raise ValueError(
            f"The base's fingerprint must be {expected_fingerprint!r} for {source}, but got {base_fingerprint!r}. "
            "Load the base model on which the adapter was trained."
        )
    layers = lora_layers(model)
    # all checks come before the first change, so that a refused model is unchanged
    _check_tensors(tensors, lora_state(model) if layers else _build_expected_state(model, config), model, source)
    if layers:
        check_merged(layers, merged=False)
        _check_scaling(layers, config, source)
    else:
        inject_lora(model, config, allow_full_rank=True, generator=torch.Generator())  # A and B are overwritten
    load_lora_state(model, tensors, source=source)


def _name_tensors(
    layers: Mapping[str, LoraLayer], modules: Mapping[str, nn.Module], biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the tensors of an adapter by PEFT's names."""
    named = {
        f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in get_peft_tensors(layer).items()
    }
    for name, module in modules.items():
        named |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    named |= {_build_bias_key(name, layers): bias for name, bias in biases.items()}
    return {f"{KEY_PREFIX}{name}": tensor for name, tensor in named.items()}


def _build_bias_key(name: str, layers: Iterable[str]) -> str:
    owner = get_bias_owner(name)
    return f"{owner}.base_layer.bias" if owner in layers else name


def _get_bias_setting(layers: Mapping[str, LoraLayer]) -> TrainedBias:
    return next((layer.config.bias for layer in layers.values()), "none")


def _build_expected_state(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """Returns the names and shapes that `lora_state` would return for the adapted model, on the meta device."""
    _, targets = plan_targets(model, config, allow_full_rank=True)
    layers = {name: LoraLayer(model.get_submodule(name), target, device="meta") for name, target in targets.items()}
    modules = match_modules_to_save(model, config.modules_to_save)
    return _name_tensors(layers, modules, find_trained_biases(model, config.bias, targets, modules))


def _check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: nn.Module, source: str
) -> None:
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
    for key in sorted(set(tensors) - set(expected)):
        if not _is_copy_of_base(key, tensors[key], model):
            raise ValueError(f"Each tensor of {source} must be in the model, but {key!r} is not. {remedy}")


def _is_copy_of_base(key: str, tensor: Tensor, model: nn.Module) -> bool:
    """Returns whether a tensor equals a base weight. PEFT also saves base weights of adapted embeddings and heads."""
    name, _, parameter = key.removeprefix(KEY_PREFIX).rpartition(".base_layer.")
    module = dict(model.named_modules()).get(name)
    base = getattr(getattr(module, "base", module), parameter, None) if parameter in ("weight", "bias") else None
    return isinstance(base, Tensor) and base.shape == tensor.shape and torch.equal(tensor.to(base), base)


def _check_scaling(layers: Mapping[str, LoraLayer], config: LoraConfig, source: str) -> None:
    for name, layer in layers.items():
        alpha = get_pattern_value(name, config.alpha_pattern, config.alpha)
        stored = scaling_factor(alpha=alpha, rank=len(layer.get_plain_matrices()[0]), rule=config.scaling)
        if not math.isclose(stored, layer.scaling, rel_tol=1e-6):
            raise ValueError(
                f"The scaling of {name!r} must be {layer.scaling:g}, but {source} has {stored:g}. "
                "Inject LoRA with the `alpha` and `scaling` with which the adapter was trained."
            )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        require_regular_file(path)
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a mapping
    except Exception as error:  # safetensors and torch raise errors of many classes for a damaged header
        raise ValueError(f"{str(path)!r} must be a whole safetensors file, but got: {error}. Save it again.") from error


def _read_config(path: Path, model: nn.Module) -> LoraConfig:
    try:
        require_regular_file(path)
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {MAX_CONFIG_BYTES:,} bytes")
        return config_from_peft(json.loads(path.read_text(encoding="utf-8")), model)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} must be a LoRA configuration, but got: {error}") from error
