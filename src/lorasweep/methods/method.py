"""The base class of the training methods, and the functions that several methods share.

A method makes a copy of the base model trainable, groups its parameters by learning rate, and saves them. Each method
has its own file and an entry in `METHODS`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasweep.config.method import MethodConfig
from lorasweep.disk import write_atomically
from lorasweep.errors import RecordError
from lorasweep.lora.adapter_files import serialise
from lorasweep.models.load import BaseModel

Module = TypeVar("Module", bound=nn.Module)

DEFAULT_HEAD_DEVIATION = 0.02
"""Standard deviation of new weights if the model's settings have no `initializer_range`: as in BERT and GPT-2."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterGroup:
    """Parameters that train at the same learning rate, `optim.lr` times `lr_factor`."""

    name: str
    params: tuple[nn.Parameter, ...]
    lr_factor: float


class Method(ABC):
    """A training method. It has no state: everything is in the model.

    The methods of this class are right for a method whose trained values are parameters of the model itself.
    """

    name: ClassVar[str]
    """The method's name in `METHODS`, `method.name` and `conf/method/`."""
    needs_autocast: ClassVar[bool] = False
    """Whether a base in bf16 must run under bf16 autocast, because this method puts fp32 parameters into the model.
    Enter autocast again at each step: inside one context it keeps its first bf16 copies of the weights."""
    weights_file: ClassVar[str] = ""

    def check(self, model: nn.Module, config: MethodConfig, *, new_head_names: Sequence[str] = ()) -> None:  # noqa: B027
        """Checks that `prepare` will accept this model and these settings. Changes nothing.

        Raises:
            ConfigError: The settings do not fit the model.
        """

    def prepare(
        self,
        model: nn.Module,
        config: MethodConfig,
        *,
        generator: torch.Generator,
        new_head_names: Sequence[str] = (),
    ) -> None:
        """Makes a copy of the base (from `copy_sharing_weights`) trainable, in place, without writing to its tensors.

        Args:
            model: The copy. Afterwards only the trained parameters, all in fp32, have `requires_grad`.
            config: Settings of this method.
            generator: CPU random stream (`seeds.init`). The new head is drawn first, then the method's own values.
            new_head_names: `BaseModel.new_head_names`, the modules that the checkpoint lacked. Every method draws
                them; all but `frozen` train them.

        Raises:
            ConfigError: The settings do not fit the model.
        """
        # drawn before the check, because a new head gets parameters that are not tied to others
        draw_head(model, new_head_names, generator=generator)
        self.check(model, config, new_head_names=new_head_names)
        self._make_trainable(model, config, generator=generator, new_head_names=new_head_names)

    @abstractmethod
    def _make_trainable(
        self, model: nn.Module, config: Any, *, generator: torch.Generator, new_head_names: Sequence[str]
    ) -> None:
        """Replaces parameters or modules of a copy that passed `check` and whose new head is drawn."""

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the trained parameters of a prepared model in groups; an empty list if no parameter trains.

        Args:
            model: A prepared model.
            lr_ratio_b: Learning rate of LoRA's B divided by that of A; other methods ignore it.
        """
        params = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
        return [ParameterGroup(name=self.name, params=params, lr_factor=1.0)] if params else []

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the trained weights of a prepared model. Each file appears whole or not at all.

        Args:
            model: A prepared model. If no parameter trains, nothing is written.
            folder: Created if missing. Files of an earlier save are replaced.
            base: The base that the model is a copy of. Its fingerprint is written too.
        """
        tensors = self._saved_tensors(model)
        if tensors:
            write_weights(folder / self.weights_file, tensors, metadata={"base_fingerprint": base.fingerprint})

    def load(self, model: nn.Module, folder: Path) -> None:
        """Puts saved weights back into a model that was prepared with the same settings.

        Raises:
            RecordError: A file is missing or damaged, or belongs to another model. The model is then unchanged.
        """
        tensors = self._saved_tensors(model)
        if tensors:
            for name, saved in read_weights(folder / self.weights_file, expected=tensors).items():
                tensors[name].copy_(saved)

    def merge(self, model: nn.Module) -> None:
        """Turns a prepared model into a plain model of its class again, whose weights contain what was trained.

        The result is for use by other tools and no longer trains. If the model has frozen weights, the trained ones are
        rounded to their dtype.
        """
        round_trained(model)

    def _saved_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the tensors to save, by name. They share memory with the model."""
        return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_sharing_weights(model: Module) -> Module:
    """Returns a copy with its own modules, buffers and settings that shares the original's parameters.

    So every run gets its own module tree to change, while the base's weights are in memory once. Buffers are copied,
    because some layers write to them in training, and because they are small.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo=dict(shared))


def draw_head(model: nn.Module, names: Sequence[str], *, generator: torch.Generator | None) -> None:
    """Draws the parameters of new modules in a copy of the base: weights normal, biases 0, norms' weights 1.

    The checkpoint lacks these modules, such as a classifier's head. Values are drawn in fp32 and rounded to the base's
    dtype. The parameters are replaced, so no tensor of the base is written to.

    Args:
        model: A copy from `copy_sharing_weights`, with no LoRA layers yet.
        names: Names of the new modules (`BaseModel.new_head_names`).
        generator: CPU random stream (`seeds.init`), drawn in the model's order before anything else of a run.
    """
    settings: Any = getattr(model, "config", None)
    if hasattr(settings, "get_text_config"):
        settings = settings.get_text_config()  # a model for images and text nests the settings of its text part
    deviation = getattr(settings, "initializer_range", None) or DEFAULT_HEAD_DEVIATION
    for name in names:
        for module in model.get_submodule(name).modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() > 1:
                    values = torch.randn(parameter.shape, generator=generator) * deviation
                else:
                    values = torch.full(parameter.shape, 1.0 if key == "weight" else 0.0)
                # a model on the meta device gets its weights from the checkpoint later, which lacks these
                device = "cpu" if parameter.is_meta else parameter.device
                values = values.to(device, parameter.dtype)
                setattr(module, key, nn.Parameter(values, requires_grad=parameter.requires_grad))


def train_copies(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Replaces parameters of `model` by trainable fp32 copies."""
    copies = {id(p): nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in parameters}
    replace_parameters(model, copies)


def replace_parameters(model: nn.Module, replacements: Mapping[int, nn.Parameter]) -> None:
    """Replaces parameters, given by `id`, wherever `model` uses them, so that tied parameters stay tied."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in replacements:
                setattr(module, name, replacements[id(parameter)])


def round_trained(model: nn.Module) -> None:
    """Freezes all parameters, and replaces those of another dtype than the largest frozen one by rounded copies."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.requires_grad_(False)
    if frozen:
        dtype = max(frozen, key=nn.Parameter.numel).dtype  # small ones, such as norms, may be wider
        wider = [p for p in model.parameters() if p.is_floating_point() and p.dtype != dtype]
        # copies, because a frozen parameter may belong to the base that other runs share
        replace_parameters(model, {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in wider})


def untie_settings(model: nn.Module) -> None:
    """Sets `tie_word_embeddings` to False if the head has its own weight: loading would otherwise tie it again."""
    settings = getattr(model, "config", None)
    if not getattr(settings, "tie_word_embeddings", False):
        return
    assert isinstance(model, PreTrainedModel)
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def write_weights(file: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all; creates its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(file, serialise(contiguous, metadata={"format": "pt", **metadata}))


def read_weights(file: Path, *, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads a safetensors file that must hold exactly the expected names and shapes.

    Raises:
        RecordError: The file is missing or damaged, or has other names or shapes.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{str(file)!r} must be a safetensors file, but can't be read: {error}.") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected_shapes = {name: tensor.shape for name, tensor in expected.items()}
    if shapes != expected_shapes:
        both = sorted(shapes | expected_shapes)
        wrong = next(name for name in both if shapes.get(name) != expected_shapes.get(name))
        raise RecordError(
            f"{str(file)!r} must hold the weights of this model, but differs from it in {wrong!r}. "
            "Load it into the base and method that it was trained with."
        )
    return tensors
