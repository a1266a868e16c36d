"""The base class of the training methods, and functions that several methods share.

A method makes a copy of the base model trainable, groups the trained parameters by learning rate, and saves them. Each
has an entry in `METHODS`, from which `bind` takes it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasweep.config.method import LoraConfig, MethodSettings
from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError
from lorasweep.lora.targets import Coverage
from lorasweep.models.load import BaseModel

Module = TypeVar("Module", bound=nn.Module)
Config = TypeVar("Config", bound=MethodSettings)

DEFAULT_HEAD_DEVIATION = 0.02
"""Standard deviation of a new head's weights if the model's settings have no `initializer_range`. BERT and GPT-2 use
the same value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterGroup:
    """Parameters that train with the learning rate `optim.lr` · `lr_factor`."""

    name: str
    params: tuple[nn.Parameter, ...]
    lr_factor: float


@dataclass(frozen=True)
class Method(ABC, Generic[Config]):
    """A training method with its settings. What is implemented here is for one that trains parameters of the model."""

    config: Config
    needs_autocast: ClassVar[bool] = False
    """Whether a bf16 base must run under bf16 autocast, because this method puts fp32 parameters into the model. Enter
    a new autocast context at each step: within one context, autocast keeps its bf16 copies of the first weights."""
    weights_file: ClassVar[str] = ""
    loads_onto_base: ClassVar[bool] = False
    """Whether `load` takes a copy of the base instead of a prepared model, because the files say how to adapt it."""

    def check(self, model: nn.Module, *, new_head_names: Sequence[str] = ()) -> None:
        """Raises a ConfigError if the settings do not fit the model, without changing the model."""
        self.find_coverage(model, new_head_names=new_head_names)

    def find_coverage(self, model: nn.Module, *, new_head_names: Sequence[str] = ()) -> Coverage | None:
        """Returns the layers that the settings adapt; None if the method has no targets. Raises as `check`."""
        return None

    def get_slot_config(self, new_head_names: Sequence[str]) -> LoraConfig:
        """Returns the LoRA that a run trains in a slot. Only methods whose settings say `packs` have one."""
        raise NotImplementedError

    def prepare(self, base: BaseModel, *, generator: torch.Generator) -> nn.Module:
        """Returns a trainable copy of the base, whose tensors do not change. Only trained parameters need gradients.

        Every method draws a new head from `generator`, the CPU stream of `seeds.init`, before its own values. Raises
        ConfigError if the settings do not fit the model.
        """
        model = copy_sharing_weights(base.model)
        # before the check, because drawing unties the head, and the check depends on ties
        draw_head(model, base.new_head_names, generator=generator)
        self.check(model, new_head_names=base.new_head_names)
        self._make_trainable(model, base=base, generator=generator)
        return model

    @abstractmethod
    def _make_trainable(self, model: nn.Module, *, base: BaseModel, generator: torch.Generator) -> None:
        """Replaces parameters or modules of a copy. `check` has accepted the copy, and its new head is drawn."""

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the trained parameters of a prepared model, grouped by learning rate; empty if no parameter trains.

        `lr_ratio_b` is the learning rate of LoRA's B divided by that of A. Other methods ignore it.
        """
        params = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
        return [ParameterGroup(name=self.config.name, params=params, lr_factor=1.0)] if params else []

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the trained weights of a prepared model atomically.

        The folder is created if it is missing. If no parameter trains, no file is written.
        """
        if tensors := self._get_tensors_to_save(model):
            folder.mkdir(parents=True, exist_ok=True)
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            write_atomically(folder / self.weights_file, partial(save_file, contiguous))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads saved weights into a model that was prepared with the same settings, or see `loads_onto_base`.

        Raises RecordError if a file is missing or damaged, or is of another model. The model is then unchanged.
        """
        tensors, file = self._get_tensors_to_save(model), folder / self.weights_file
        if not tensors:
            return
        try:
            saved = load_file(file)
        except (OSError, SafetensorError) as error:
            raise RecordError(f"{str(file)!r} must be a safetensors file, but can't be read: {error}.") from error
        shapes = [{name: tensor.shape for name, tensor in named.items()} for named in (saved, tensors)]
        different = [name for name in {**saved, **tensors} if shapes[0].get(name) != shapes[1].get(name)]
        if different:
            raise RecordError(
                f"{str(file)!r} must contain the weights of this model, but {min(different)!r} differs. "
                "Load the file into the base and method with which it was trained."
            )
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])

    def merge(self, model: nn.Module) -> None:
        """Turns a prepared model into a plain model of its class that contains the trained weights, in place.

        If it has frozen weights, the trained ones are rounded to their dtype.
        """
        round_to_frozen_dtype(model)

    def _get_tensors_to_save(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the tensors to save by name. They share memory with the model, so `load` can write into them."""
        return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_sharing_weights(model: Module) -> Module:
    """Returns a copy of a model that shares the model's parameters, but not its modules, buffers and settings.

    So the base's weights are in memory once. Buffers are copied, because some layers write to them in training.
    """
    # deepcopy does not copy objects that are already in `memo`
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def draw_head(model: nn.Module, names: Sequence[str], *, generator: torch.Generator | None) -> None:
    """Draws initial values for a new head in a copy of the base: weights normal, biases 0, norms' weights 1.

    A new head consists of modules that are missing in the checkpoint (`BaseModel.new_head_names`). It must be the first
    that a run draws from `generator`, the CPU stream of `seeds.init`. Values are drawn in fp32 and rounded to the dtype
    of the base. New parameters replace the old ones, so the base's tensors do not change.
    """
    settings: Any = getattr(model, "config", None)
    if hasattr(settings, "get_text_config"):
        settings = settings.get_text_config()  # a model of images and text has nested settings for text
    deviation = getattr(settings, "initializer_range", None) or DEFAULT_HEAD_DEVIATION
    for name in names:
        for module in model.get_submodule(name).modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() > 1:
                    values = torch.randn(parameter.shape, generator=generator) * deviation
                else:
                    values = torch.full(parameter.shape, 1.0 if key == "weight" else 0.0)
                values = values.to(parameter.device, parameter.dtype)
                setattr(module, key, nn.Parameter(values, requires_grad=parameter.requires_grad))


def replace_by_trainable_copies(model: nn.Module, names: Collection[str]) -> None:
    """Replaces the parameters with these names by trainable fp32 copies. Names of one parameter get one copy.

    Under autocast, the modules that use them still return the dtype of the old parameters. So a bf16 model computes as
    before, bit for bit on the CPU, and all methods of a sweep are compared in one precision. Gated norms and experts
    are an exception: inside them, some products are rounded to bf16 later than before.
    """
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for place, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        own = {key: parameter for key, parameter in own.items() if f"{place}.{key}".lstrip(".") in names}
        if dtype := next((parameter.dtype for parameter in own.values() if parameter.dtype != torch.float32), None):
            # autocast returns fp32 from embeddings and norms, and then adds all later outputs to it in fp32
            module.register_forward_hook(partial(_cast_output, dtype=dtype))
        for key, parameter in own.items():
            if parameter not in copies:
                copies[parameter] = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            setattr(module, key, copies[parameter])


def _cast_output(module: nn.Module, inputs: Any, output: Any, *, dtype: torch.dtype) -> Any:
    if isinstance(output, tuple):
        return tuple(_cast_output(module, inputs, part, dtype=dtype) for part in output)
    if isinstance(output, Tensor) and output.is_floating_point() and torch.is_autocast_enabled(output.device.type):
        return output.to(dtype)
    return output


def replace_parameters(model: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replaces parameters, the keys of `new`, wherever `model` uses them, so that tied parameters stay tied."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter in new:
                setattr(module, name, new[parameter])


def round_to_frozen_dtype(model: nn.Module) -> None:
    """Freezes all parameters, and rounds them to the dtype of the largest parameter that was frozen already."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.requires_grad_(False)
    if frozen:
        dtype = max(frozen, key=nn.Parameter.numel).dtype  # the largest, because small norms may have a wider dtype
        wider = [p for p in model.parameters() if p.is_floating_point() and p.dtype != dtype]
        # replaced by copies, because frozen parameters may belong to the base, which other runs share
        replace_parameters(model, {p: nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in wider})


def clear_tie_setting(model: nn.Module) -> None:
    """Sets `tie_word_embeddings` to False if the head is not tied. Otherwise, transformers ties it when it loads."""
    settings = getattr(model, "config", None)
    if not getattr(settings, "tie_word_embeddings", False):
        return
    assert isinstance(model, PreTrainedModel)
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
