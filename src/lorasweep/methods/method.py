"""What a method is: it makes a copy of the base trainable, says what trains at which rate, and saves what it changed.

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
    """What they are, such as `lora_b`."""
    params: tuple[nn.Parameter, ...]
    lr_factor: float
    """Their learning rate over `optim.lr`."""


class Method(Protocol):
    """What trains. It holds no state: everything is in the model."""

    @property
    def name(self) -> str:
        """The method's name in `METHODS`, `method.name` and `conf/method/`."""

    @property
    def needs_autocast(self) -> bool:
        """Whether a base in bf16 must run under bf16 autocast, because this method puts fp32 parameters into it.

        Autocast is to be entered anew at each step: inside one context it keeps its first bf16 copies of the weights.
        """

    def check(self, model: nn.Module, config: MethodConfig, *, head: tuple[str, ...] = ()) -> None:
        """Makes sure that `prepare` will work on this model with these arguments; changes nothing.

        Raises:
            ConfigError: It will not.
        """

    def prepare(
        self, model: nn.Module, config: MethodConfig, *, generator: torch.Generator, head: tuple[str, ...] = ()
    ) -> None:
        """Makes a copy of the base (from `copy_sharing_weights`) trainable, in place, without writing to its tensors.

        Args:
            model: The copy; only what the method trains has `requires_grad` afterwards, in fp32.
            config: Settings of this method.
            generator: CPU random stream of what is drawn anew (`seeds.init`): the head first, then the rest.
            head: Names of the modules that the checkpoint lacked (`BaseModel.head`). Every method draws them
                (`draw_head`); all but `frozen` train them.

        Raises:
            ConfigError: The settings do not fit the model.
        """

    def trainable_groups(self, model: nn.Module, *, lr_ratio_b: float) -> list[ParameterGroup]:
        """Returns what trains in a prepared model; empty where nothing does.

        Args:
            model: A prepared model.
            lr_ratio_b: Learning rate of LoRA's B over that of A; without effect for other methods.
        """

    def save(self, model: nn.Module, folder: Path, *, base: BaseModel) -> None:
        """Writes the weights that a run keeps, each file whole or not at all; nothing where nothing trains.

        Args:
            model: A prepared model.
            folder: Made when missing; files of an earlier save are replaced.
            base: The base that the model is a copy of; adapters name it and its fingerprint.
        """

    def load(self, model: nn.Module, folder: Path) -> None:
        """Puts saved weights back into a model prepared with the same settings.

        Raises:
            RecordError: A file is missing or damaged, or belongs to another model; the model is then unchanged.
        """

    def merge(self, model: nn.Module) -> None:
        """Makes a prepared model a plain one of its own class again, which holds what was trained in its weights.

        For use by other tools: it no longer trains. What trained beside frozen weights is rounded to their dtype.
        """


def copy_sharing_weights(model: Module) -> Module:
    """Returns a copy with its own modules, buffers and settings, whose parameters are the very tensors of the original.

    So every run gets a module tree to change, and the base is in memory once. Buffers are copied: some layers write to
    them in training, and they are small.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo=dict(shared))


def train_copies(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Replaces parameters of `model` by trainable fp32 copies, wherever they are used, so that tied ones stay tied."""
    copies = {id(p): nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in parameters}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in copies:
                setattr(module, name, copies[id(parameter)])


def frozen_dtype(model: nn.Module) -> torch.dtype | None:
    """Returns the dtype of the largest tensor that does not train (small ones may be wider); None where all do."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return max(frozen, key=nn.Parameter.numel).dtype if frozen else None


def round_trained(model: nn.Module) -> None:
    """Rounds what trains, and fp32 copies beside it, to the dtype of the frozen rest, and stops it from training."""
    dtype = frozen_dtype(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if dtype is not None and parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)  # never a tensor of the base, all of which have this dtype


def untie_settings(model: nn.Module) -> None:
    """Notes in the settings where the head has its own weight, which transformers would tie again on loading."""
    settings = getattr(model, "config", None)
    if not getattr(settings, "tie_word_embeddings", False):
        return
    assert isinstance(model, PreTrainedModel)
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def one_group(name: str, model: nn.Module) -> list[ParameterGroup]:
    """Returns all parameters that train, at `optim.lr`."""
    params = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    return [ParameterGroup(name=name, params=params, lr_factor=1.0)]


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Gives a new folder to write into; at the end each file moves into `folder` whole, in order of names."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", suffix=".tmp", dir=folder) as name:
        yield Path(name)
        for file in sorted(Path(name).iterdir()):
            file.chmod(0o644)
            move_into_place(file, folder / file.name)


def read_weights(file: Path, *, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads a safetensors file that must hold exactly the expected names and shapes.

    Raises:
        RecordError: It does not, is damaged or missing.
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
