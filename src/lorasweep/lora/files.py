"""Adapters on disk in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`), for every tool to use.

What is read here is untrusted: only JSON and safetensors are opened, and names and shapes are checked before the model
is touched. What is written appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig, TrainedBias
from lorasweep.disk import write_atomically
from lorasweep.lora.functional import scaling_factor
from lorasweep.lora.inject import build_layers, inject_lora
from lorasweep.lora.layers import LoraLayer, lora_layers
from lorasweep.lora.merge import check_merged
from lorasweep.lora.peft_format import (
    KEY_PREFIX,
    config_from_peft,
    config_to_peft,
    layer_tensors,
    load_layer_tensors,
)
from lorasweep.lora.targets import Coverage, alpha_of, plan_targets
from lorasweep.lora.trained import find_trained_biases, find_trained_modules, trained_modules

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FINGERPRINT_KEY = "base_fingerprint"


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, such as `base_model.model.<layer>.lora_A.weight` (rank, d_in).

    They share memory with the parameters where a layer is stored as it is (all but PiSSA and fused projections).
    """
    layers, modules = lora_layers(model), {name: module.trained for name, module in trained_modules(model).items()}
    biases = find_trained_biases(model, _bias_setting(layers), layers, modules)
    return {key: tensor.detach() for key, tensor in _name_tensors(layers, modules, biases).items()}


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_path: str,
    base_fingerprint: str | None = None,
    base_revision: str | None = None,
) -> None:
    """Writes the adapter of `model` into `folder`, which PEFT and `load_adapter` read. The base is not written.

    Each file is written beside its place and moved there whole; the configuration comes last, so a folder that has one
    has its weights.

    Args:
        model: A model with LoRA layers.
        folder: Made when missing.
        base_path: Where the base model is from (hub id or folder), for who loads the adapter.
        base_fingerprint: What identifies the base's weights; `load_adapter` can then refuse another base.
        base_revision: The base's commit, branch or tag on the hub.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("`model` must have LoRA layers, but got none. Call `inject_lora` first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # copied, since safetensors refuses two names for one memory
    tensors = {key: tensor.cpu().contiguous().clone() for key, tensor in lora_state(model).items()}
    metadata = {"format": "pt"} | ({} if base_fingerprint is None else {FINGERPRINT_KEY: base_fingerprint})
    config = config_to_peft(layers, model, base_path=base_path)
    config["revision"] = base_revision
    write_atomically(folder / WEIGHTS_FILE, serialise(tensors, metadata=metadata))
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def serialise(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of these tensors, the same bytes for the same content (`save` shuffles the metadata)."""
    written = save(dict(tensors), metadata=dict(metadata))
    length = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = text + b" " * (-len(text) % 8)  # the data stays aligned
    return len(padded).to_bytes(8, "little") + padded + written[8 + length :]


def load_adapter(model: nn.Module, folder: str | Path, *, base_fingerprint: str | None = None) -> Coverage:
    """Puts the adapter in `folder`, written here or by PEFT, onto `model`; it can go on training.

    An adapter of fused parts or of PiSSA loads onto a base model as the plain LoRA that it is stored as (a fused
    projection's parts then share one A; PiSSA's rank is doubled), and onto a model injected as it was, as itself.

    Args:
        model: The base model, or one with LoRA layers of the same names and ranks, whose tensors are then overwritten.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        base_fingerprint: Identifies `model`'s base weights; compared where the adapter says what it was trained on.

    Returns:
        The layers that the adapter has.

    Raises:
        ValueError: A file is missing, broken or uses what is not supported here; names, shapes or fingerprint show
            that the adapter belongs to another base; the model is merged. The model is then unchanged.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE, model)
    tensors, metadata = _read_tensors(folder / WEIGHTS_FILE)
    _check_fingerprint(metadata.get(FINGERPRINT_KEY), base_fingerprint, folder)
    layers = lora_layers(model)
    if layers:
        check_merged(layers, merged=False)
        _check_tensors(tensors, lora_state(model), model, folder)
        _check_scaling(layers, config, folder)
        coverage = _coverage_of(model)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever trained it has seen what there is to warn of
            _check_tensors(tensors, _expected_state(model, config), model, folder)
            coverage = inject_lora(model, config, allow_full_rank=True, generator=torch.Generator())
    _load_state(model, tensors)
    return coverage


def _name_tensors(
    layers: Mapping[str, LoraLayer], modules: Mapping[str, nn.Module], biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """PEFT's name for each tensor of an adapter."""
    named = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer_tensors(layer).items()}
    named |= {
        f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
    }
    named |= {_bias_key(name, layers): bias for name, bias in biases.items()}
    return {f"{KEY_PREFIX}{name}": tensor for name, tensor in named.items()}


def _bias_key(name: str, layers: Iterable[str]) -> str:
    owner = name.removesuffix(".bias").removesuffix(".base")
    return f"{owner}.base_layer.bias" if owner in layers else name


def _bias_setting(layers: Mapping[str, LoraLayer]) -> TrainedBias:
    return next((layer.config.bias for layer in layers.values()), "none")


def _expected_state(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """What `lora_state` would give after injecting; nothing is made but tensors on the meta device."""
    _, targets = plan_targets(model, config, allow_full_rank=True)
    layers = build_layers(model, config, targets, device="meta")
    modules = find_trained_modules(model, config.modules_to_save)
    return _name_tensors(layers, modules, find_trained_biases(model, config.bias, targets, modules))


def _load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}
    layers, modules = lora_layers(model), trained_modules(model)
    for name, layer in layers.items():
        load_layer_tensors(layer, {key: state[f"{name}.{key}"] for key in layer_tensors(layer)})
    for name, module in modules.items():
        module.trained.load_state_dict({key: state[f"{name}.{key}"] for key in module.trained.state_dict()})
    for name, bias in find_trained_biases(model, _bias_setting(layers), layers, modules).items():
        bias.data.copy_(state[_bias_key(name, layers)])


def _coverage_of(model: nn.Module) -> Coverage:
    layers = lora_layers(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return Coverage(
        matched={"adapter": tuple(layers)},
        unmatched=tuple(name for name in linear if name.removesuffix(".base") not in layers),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_params=sum(p.numel() for p in model.parameters()),
        tied={},
    )


def _check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: nn.Module, folder: Path
) -> None:
    advice = "Load it onto the base model that it was trained on."
    for key, like in expected.items():
        if key not in tensors:
            raise ValueError(f"The adapter in {str(folder)!r} must have {key!r}, but it is missing. {advice}")
        if tensors[key].shape != like.shape:
            got, shape = tuple(tensors[key].shape), tuple(like.shape)
            raise ValueError(f"{key!r} in {str(folder)!r} must have shape {shape}, but got {got}. {advice}")
        if tensors[key].is_floating_point() is not like.is_floating_point():
            dtypes = f"like {like.dtype}, but got {tensors[key].dtype}"
            raise ValueError(f"{key!r} in {str(folder)!r} must hold numbers {dtypes}. {advice}")
    for key in sorted(set(tensors) - set(expected)):
        if not _is_copy_of_base(key, tensors[key], model):
            raise ValueError(f"The adapter in {str(folder)!r} must fit the model, but {key!r} has no place. {advice}")


def _is_copy_of_base(key: str, tensor: Tensor, model: nn.Module) -> bool:
    """Whether this is the weight of an adapted embedding or head, which PEFT saves beside the adapter though frozen."""
    name, _, last = key.removeprefix(KEY_PREFIX).rpartition(".base_layer.")
    module = dict(model.named_modules()).get(name)
    base = getattr(module, "base", module)
    like = getattr(base, last, None) if last in ("weight", "bias") else None
    return isinstance(like, Tensor) and like.shape == tensor.shape and torch.equal(tensor.to(like), like)


def _check_scaling(layers: Mapping[str, LoraLayer], config: LoraConfig, folder: Path) -> None:
    for name, layer in layers.items():
        rank = layer.matrices()[0].shape[0]
        stored = scaling_factor(alpha=alpha_of(name, config), rank=rank, rule=config.scaling)
        if not math.isclose(stored, layer.scaling, rel_tol=1e-6):
            raise ValueError(
                f"The adapter in {str(folder)!r} must have scaling {layer.scaling:g} at {name!r}, but got {stored:g}. "
                "Inject with the α and scaling rule that it was trained with."
            )


def _check_fingerprint(stored: str | None, given: str | None, folder: Path) -> None:
    if stored is not None and given is not None and stored != given:
        raise ValueError(
            f"The adapter in {str(folder)!r} must belong to this base model ({given!r}), "
            f"but it was trained on {stored!r}. Load that base model."
        )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        message = f"{str(path)!r} must be a whole safetensors file, but got {error}. Copy or save it again."
        raise ValueError(message) from error


def _read_config(path: Path, model: nn.Module) -> LoraConfig:
    _check_file(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be JSON, but got {error}. Copy or save it again.") from error
    try:
        return config_from_peft(raw, model)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} can't be loaded: {error}") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{str(path)!r} must be a file, but there is none. Name a folder with a saved adapter.")
