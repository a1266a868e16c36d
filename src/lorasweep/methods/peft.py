"""`peft`: trains adapters of PEFT that replace layers, such as VeRA and IA³.

PEFT checks the settings and makes, saves, loads and merges the adapter.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lorasweep.config.components import require_package
from lorasweep.config.method import PeftConfig
from lorasweep.disk import write_atomically
from lorasweep.errors import ConfigError, RecordError, describe_error
from lorasweep.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, find_task_type
from lorasweep.methods.method import (
    Method,
    clear_tie_setting,
    copy_sharing_weights,
    replace_parameters,
    round_to_frozen_dtype,
)
from lorasweep.models.load import BaseModel

ADAPTER = "default"
"""PEFT's name of the only adapter of a model."""
REFUSED_KINDS, REFUSED_INITS = ("ADALORA",), ("eva", "lora_ga", "olora")
"""Kinds of PEFT that need calls in training, and values of `init_lora_weights` that need data or write into the base,
which runs share. PEFT raises nothing for them."""


class PeftMethod(Method[PeftConfig]):
    """Trains an adapter of PEFT in fp32, and a new head in full, and saves both with PEFT.

    The adapter's layers are inside the model, and PEFT's `PeftModel` around it is kept as `_peft_model`, out of the
    module tree. So the model keeps its class, its names and its `forward`.
    """

    needs_autocast = True
    loads_onto_base = True

    def check(self, model: nn.Module, *, new_head_names: Sequence[str] = ()) -> None:
        """Raises a ConfigError if a key is wrong, or PEFT can't make these layers for the model."""
        peft_config = build_peft_config(self.config.config, model, new_head_names=new_head_names)
        copy = copy_sharing_weights(model)
        with torch.random.fork_rng(devices=[]):
            add_adapter(copy, peft_config, has_values=False)

    def _make_trainable(self, model: nn.Module, *, base: BaseModel, generator: torch.Generator) -> None:
        peft_config = build_peft_config(self.config.config, model, new_head_names=base.new_head_names)
        with torch.random.fork_rng(devices=[]):  # PEFT draws from torch's default stream
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            add_adapter(model, peft_config)

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        wrapper = get_wrapper(model)
        wrapper.peft_config[ADAPTER].base_model_name_or_path = base.path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder.parent) as temporary, quiet_peft():
            wrapper.save_pretrained(temporary, save_embedding_layers=False)  # True or "auto" may ask the hub
            # weights first: if the process stops in between, a folder with a configuration still has its weights
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                write_atomically(folder / name, (Path(temporary) / name).read_bytes())

    def load(self, model: nn.Module, folder: Path) -> None:
        source = f"the adapter in {str(folder)!r}"
        try:
            peft = import_peft()
            with quiet_peft():
                # PEFT would look for a missing file on the hub if the folder's path had the form of a hub id
                peft_config = peft.PeftConfig.from_pretrained(str(folder.resolve()))
            peft_config.inference_mode = False
            tensors = load_file(folder / WEIGHTS_FILE)
            with torch.random.fork_rng(devices=[]):
                add_adapter(model, peft_config)
            model.train(model.training)  # also the new modules
            with quiet_peft():
                loaded = peft.set_peft_model_state_dict(get_wrapper(model), tensors, adapter_name=ADAPTER)
        except (OSError, ValueError, AttributeError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise RecordError(f"{source} must load, but does not: {describe_error(error)}.") from error
        # adapters may share one parameter under several names, of which the file has one
        named = list(get_wrapper(model).named_parameters(remove_duplicate=False))
        read = {id(parameter) for name, parameter in named if name not in loaded.missing_keys}
        missing = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in read]
        if wrong := missing + list(loaded.unexpected_keys):
            raise RecordError(f"{source} must have the weights of its configuration, but {wrong[0]!r} differs.")

    def merge(self, model: nn.Module) -> None:
        """Merges the adapter into the weights. Raises ConfigError if PEFT can't do so for this kind."""
        from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 (an optional package)

        try:
            for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
                base = layer.get_base_layer()
                for name, parameter in base.named_parameters(recurse=False):  # PEFT merges in place
                    setattr(base, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            with quiet_peft():
                get_wrapper(model).merge_and_unload()
        except (NotImplementedError, AttributeError, ValueError, TypeError) as error:
            raise ConfigError(
                f"the adapter must be one that PEFT can merge into the base, but: {describe_error(error)}. "
                "Only PEFT can use it: `lorasweep export --format peft`."
            ) from error
        del model.__dict__["_peft_model"]
        model.__dict__.pop("peft_config", None)
        clear_tie_setting(model)
        round_to_frozen_dtype(model)


def import_peft() -> Any:
    """Returns the package PEFT. Raises ConfigError if it is not installed."""
    require_package("peft", key="method=peft", extra="peft")
    return import_module("peft")


def build_peft_config(settings: Mapping[str, Any], model: nn.Module, *, new_head_names: Sequence[str] = ()) -> Any:
    """Returns PEFT's configuration for `method.config`.

    Raises ConfigError if PEFT is not installed or refuses the settings, or a run can't do what they ask for.
    """
    import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: PLC0415 (an optional package)

    settings = dict(settings)
    kind = settings.pop("peft_type", None)
    if new_head_names:
        settings["modules_to_save"] = [*(settings.get("modules_to_save") or ()), *new_head_names]
    settings["task_type"] = find_task_type(model, has_trained_modules=bool(settings.get("modules_to_save")))
    if (got := kind) in REFUSED_KINDS or (got := settings.get("init_lora_weights")) in REFUSED_INITS:
        raise ConfigError(f"`method.config` must need no calls or data, and leave the base as it is, but got {got!r}.")
    try:
        with quiet_peft():
            return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings)
    except Exception as error:
        raise _refuse(f"make {kind!r}", error) from error


def add_adapter(model: nn.Module, peft_config: Any, *, has_values: bool = True) -> None:
    """Lets PEFT replace layers of a copy of the base, in place. The base's weights do not change.

    Without `has_values` the adapter has no initial values and needs no memory.

    Raises ConfigError if PEFT can't make these layers for the model.
    """
    peft, kind = import_peft(), peft_config.peft_type.value
    if not has_values and str(getattr(peft_config, "init_lora_weights", "")).startswith("pissa"):
        peft_config = replace(peft_config, init_lora_weights=True)  # PiSSA reads the weights
    # PEFT gives parameters new data and trains some of them, so they must not be those of the base
    replace_parameters(model, {p: nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()})
    try:
        with quiet_peft():
            wrapper = peft.get_peft_model(model, peft_config, low_cpu_mem_usage=not has_values)
    except Exception as error:  # each kind raises other errors for settings that do not fit the model
        raise _refuse(f"put {kind} into the model", error) from error
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    for parameter in trained:  # PEFT makes some layers in the base's dtype
        parameter.data = parameter.data.to(torch.float32, copy=True)
    if getattr(wrapper.base_model, "model", None) is not model or not trained:
        raise ConfigError(f"`method.config.peft_type` must replace layers of the model, but {kind} does not.")
    model.__dict__["_peft_model"] = wrapper  # not an attribute, which would put the model into itself


def get_wrapper(model: nn.Module) -> Any:
    """Returns the `PeftModel` of a prepared model."""
    return model.__dict__["_peft_model"]


def quiet_peft() -> warnings.catch_warnings[None]:
    """Returns a context without PEFT's warnings, which say nothing about the training."""
    return warnings.catch_warnings(action="ignore")


def _refuse(action: str, error: Exception) -> ConfigError:
    return ConfigError(f"PEFT must {action} with `method.config`, but can't: {describe_error(error)}.")
