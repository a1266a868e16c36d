"""Adapters on disk in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`), for every tool to use.

What is read here is untrusted: only JSON and safetensors are opened, and names and shapes are checked before the model
is touched. What is written appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.inject import inject_lora
from lorasweep.lora.layers import LoraLinear, lora_layers
from lorasweep.lora.merge import check_merged
from lorasweep.lora.peft_format import KEY_PREFIX, config_from_peft, config_to_peft
from lorasweep.lora.targets import Coverage, find_targets

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FINGERPRINT_KEY = "base_fingerprint"


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names: `base_model.model.<layer>.lora_A.weight` (rank, d_in) and `lora_B`.

    They are the parameters' own memory, not copies.
    """
    return {key: parameter.detach() for key, parameter in _adapter_parameters(lora_layers(model)).items()}


def save_adapter(model: nn.Module, folder: str | Path, *, base_path: str, base_fingerprint: str | None = None) -> None:
    """Writes the adapter of `model` into `folder`, which PEFT and `load_adapter` read. The base is not written.

    Each file is written beside its place and moved there whole; the configuration comes last, so a folder that has one
    has its weights.

    Args:
        model: A model with LoRA layers.
        folder: Made when missing.
        base_path: Where the base model is from (hub id or folder), for who loads the adapter.
        base_fingerprint: What identifies the base's weights; `load_adapter` can then refuse another base.

    Raises:
        ValueError: The model has no LoRA layers.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("`model` must have LoRA layers, but got none. Call `inject_lora` first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in lora_state(model).items()}
    metadata = {"format": "pt"} | ({} if base_fingerprint is None else {FINGERPRINT_KEY: base_fingerprint})
    config = config_to_peft(layers, model, base_path=base_path)
    _write_whole(folder / WEIGHTS_FILE, save(tensors, metadata=metadata))
    _write_whole(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def load_adapter(model: nn.Module, folder: str | Path, *, base_fingerprint: str | None = None) -> Coverage:
    """Puts the adapter in `folder`, written here or by PEFT, onto `model`; it can go on training.

    Args:
        model: The base model, or one with LoRA layers of the same names and ranks, whose A and B are then overwritten.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        base_fingerprint: Identifies `model`'s base weights; compared where the adapter says what it was trained on.

    Returns:
        The layers that the adapter has.

    Raises:
        ValueError: A file is missing, broken or uses what is not supported here; names, shapes or fingerprint show
            that the adapter belongs to another base; the model is merged. The model is then unchanged.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    tensors, metadata = _read_tensors(folder / WEIGHTS_FILE)
    _check_fingerprint(metadata.get(FINGERPRINT_KEY), base_fingerprint, folder)
    layers = lora_layers(model)
    if layers:
        check_merged(layers, merged=False)
        expected = {key: tuple(tensor.shape) for key, tensor in _adapter_parameters(layers).items()}
        coverage = _coverage_of(layers, model)
    else:
        coverage = find_targets(model, config, allow_full_rank=True)
        expected = _expected_shapes(model, coverage, config)
    _check_tensors(tensors, expected, folder)
    if not layers:
        inject_lora(model, config, allow_full_rank=True)
    with torch.no_grad():
        for key, parameter in _adapter_parameters(lora_layers(model)).items():
            parameter.copy_(tensors[key])
    return coverage


def _adapter_parameters(layers: Mapping[str, LoraLinear]) -> dict[str, nn.Parameter]:
    parameters = {}
    for name, layer in layers.items():
        parameters[f"{KEY_PREFIX}{name}.lora_A.weight"] = layer.lora_a
        parameters[f"{KEY_PREFIX}{name}.lora_B.weight"] = layer.lora_b
    return parameters


def _coverage_of(layers: Mapping[str, LoraLinear], model: nn.Module) -> Coverage:
    return Coverage(
        matched={"adapter": tuple(layers)},
        unmatched=tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.removesuffix(".base") not in layers
        ),
        trainable_params=sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers.values()),
        total_params=sum(parameter.numel() for parameter in model.parameters()),
    )


def _expected_shapes(model: nn.Module, coverage: Coverage, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in coverage.layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        shapes[f"{KEY_PREFIX}{name}.lora_A.weight"] = (config.rank, layer.in_features)
        shapes[f"{KEY_PREFIX}{name}.lora_B.weight"] = (layer.out_features, config.rank)
    return shapes


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    advice = "Load it onto the base model that it was trained on."
    for key, shape in expected.items():
        if key not in tensors:
            raise ValueError(f"The adapter in {str(folder)!r} must have {key!r}, but it is missing. {advice}")
        if tuple(tensors[key].shape) != shape:
            got = tuple(tensors[key].shape)
            raise ValueError(f"{key!r} in {str(folder)!r} must have shape {shape}, but got {got}. {advice}")
        if not tensors[key].is_floating_point():
            raise ValueError(
                f"{key!r} in {str(folder)!r} must hold real numbers, but got {tensors[key].dtype}. {advice}"
            )
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise ValueError(f"The adapter in {str(folder)!r} must fit the model, but {extra[0]!r} has no layer. {advice}")


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
        raise ValueError(
            f"{str(path)!r} must be a whole safetensors file, but got {error}. Copy or save it again."
        ) from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{str(path)!r} must be a file, but there is none. Name a folder with a saved adapter.")


def _read_config(path: Path) -> LoraConfig:
    _check_file(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be JSON, but got {error}. Copy or save it again.") from error
    try:
        return config_from_peft(raw)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} can't be loaded: {error}") from error


def _write_whole(path: Path, content: bytes) -> None:
    """Writes beside `path`, flushes to disk and moves into place, so that `path` is never half written."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp keeps others from reading
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
