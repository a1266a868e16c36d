"""The protocol of a training method: it makes a copy of the base trainable, groups its parameters and saves them.

Each method has its own file and an entry in `METHODS`. Comes after `models` and `lora`, before `training`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasweep.config.method import MethodConfig
from lorasweep.disk import move_into_place
from lorasweep.errors import RecordError
from lorasweep.models.load import BaseModel

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterGroup:
    """Parameters that train at the same learning rate."""

    name: str
    """Name of the group, such as `lora_b`."""
    params: tuple[nn.Parameter, ...]
    lr_factor: float
    """Factor by which `optim.lr` is multiplied to get their learning rate."""


class Method(Protocol):
    """A training method. It has no state: everything is in the model."""

    @property
    def name(self) -> str:
        """The method's name in `METHODS`, `method.name` and `conf/method/`."""

    @property
    def needs_autocast(self) -> bool:
        """Whether a base in bf16 must run under bf16 autocast, because this method puts fp32 parameters into it.

        Enter autocast again at each step: inside one context it keeps its first bf16 copies of the weights.
        """

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Checks that `prepare` will work on this model with these arguments; changes nothing.

        Raises:
            ConfigError: The settings do not fit the model.
        """

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Makes a copy of the base (from `copy_sharing_weights`) trainable, in place, without writing to its tensors.

        Args:
            model: The copy. Afterwards only the trained parameters, all in fp32, have `requires_grad`.
            config: Settings of this method.
            generator: CPU random stream for new values (`seeds.init`): those of the head are drawn first.
            head: Names of the modules that the checkpoint lacked (`BaseModel.head`). Every method draws them
                (`draw_head`); all but `frozen` train them.

        Raises:
            ConfigError: The settings do not fit the model.
        """

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns the trained parameters of a prepared model in groups; an empty list if no parameter trains.

        Args:
            model: A prepared model.
            lr_ratio_b: Learning rate of LoRA's B divided by that of A; other methods ignore it.
        """

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the trained weights, each file whole or not at all; writes nothing if no parameter trains.

        Args:
            model: A prepared model.
            folder: Folder to write to; created if missing. Files of an earlier save are replaced.
            base: The base that the model is a copy of; adapters name it and its fingerprint.
        """

    def load(self, model: nn.Module, folder: Path) -> None:
        """Puts saved weights back into a model prepared with the same settings.

        Raises:
            RecordError: A file is missing or damaged, or belongs to another model; the model is then unchanged.
        """

    def merge(self, model: nn.Module) -> None:
        """Turns a prepared model into a plain model of its class again, whose weights contain the trained change.

        The result is for use by other tools and no longer trains. If the model has frozen weights, the trained ones are
        rounded to their dtype.
        """


def copy_sharing_weights(model: Module) -> Module:
    """Returns a copy with its own modules, buffers and settings that shares the original's parameters.

    So every run gets its own module tree to change, while the base's weights are in memory once. Buffers are copied,
    because some layers write to them in training, and because they are small.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo=dict(shared))


def train_copies(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Replaces parameters by trainable fp32 copies wherever `model` uses them, so that tied parameters stay tied."""
    copies = {id(p): nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in parameters}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in copies:
                setattr(module, name, copies[id(parameter)])


def frozen_dtype(model: nn.Module) -> torch.dtype | None:
    """Returns the dtype of the largest frozen parameter (small ones may be wider); None if none is frozen."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return max(frozen, key=nn.Parameter.numel).dtype if frozen else None


def round_trained(model: nn.Module) -> None:
    """Freezes all parameters, and rounds trained ones and frozen fp32 copies to the dtype of the frozen ones."""
    dtype = frozen_dtype(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if dtype is not None and parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)  # never a tensor of the base: all of them have this dtype


def untie_settings(model: nn.Module) -> None:
    """Sets `tie_word_embeddings` to False if the head has its own weight: loading would otherwise tie it again."""
    settings = getattr(model, "config", None)
    if not getattr(settings, "tie_word_embeddings", False):
        return
    assert isinstance(model, PreTrainedModel)
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def one_group(name: str, model: nn.Module) -> list[ParameterGroup]:
    """Returns all trained parameters as one group with the learning rate `optim.lr`."""
    params = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    return [ParameterGroup(name=name, params=params, lr_factor=1.0)]


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write into; at the end moves each file whole into `folder`, in order of names."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", suffix=".tmp", dir=folder) as name:
        yield Path(name)
        for file in sorted(Path(name).iterdir()):
            file.chmod(0o644)
            move_into_place(file, folder / file.name)


def read_weights(file: Path, *, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads a safetensors file that must hold exactly the expected names and shapes.

    Raises:
        RecordError: The file is missing or damaged, or has other names or shapes.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{str(file)!r} must be a safetensors file, but can't be read: {error}.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if shapes != wanted:
        differing = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise RecordError(
            f"{str(file)!r} must hold the weights of this model, but differs from it in {differing[0]!r}. "
            "Load it into the base and method that it was made with."
        )
    return tensors
