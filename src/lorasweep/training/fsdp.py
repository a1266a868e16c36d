"""FSDP2 (`trainer.strategy=fsdp`): each process holds a shard of every block's weights, by `ModelParallelStrategy`.

A block's weights are whole only while the block computes. LoRA's own weights are small and stay whole everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lorasweep.errors import ConfigError
from lorasweep.models.weight_files import WeightFiles


class FsdpStrategy(ModelParallelStrategy):
    """Lightning's strategy, but checkpoints hold the trained weights alone, whole: any number of processes can resume.

    The checkpoints of `ModelParallelStrategy` would gather the frozen base too, and number the optimizer's state by all
    parameters of the model.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Returns True: the optimizer's state comes from `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the trained weights, whole."""
        assert self.lightning_module is not None
        return {name: whole(p) for name, p in self.lightning_module.named_parameters() if p.requires_grad}

    def load_checkpoint(
        self,
        checkpoint_path: _PATH,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> dict[str, Any]:
        """Reads a checkpoint on every process, without unpickling."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:  # noqa: FBT001, FBT002
        """Loads this process's shard of each tensor."""
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        state = {name: shard_like(tensor, own[name]) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state of an optimizer, whole."""
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        moments = {
            number: {name: whole(value) if isinstance(value, Tensor) else value for name, value in of.items()}
            for number, of in state["state"].items()
        }
        return {**state, "state": moments}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this process's shard of each moment."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                number: {name: _shard_moment(value, parameters[number]) for name, value in of.items()}
                for number, of in state["state"].items()
            }
            states.append({**state, "state": moments})
        Strategy.load_optimizer_state_dict(self, {**checkpoint, "optimizer_states": states})


def check_shardable(model: nn.Module) -> None:
    """Checks that a base model's weights can be sharded.

    Raises:
        ConfigError: They are not floating-point numbers, but quantised.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(
                f"`trainer.strategy` must be ddp for a quantised base, but got 'fsdp', and {name} is {parameter.dtype}."
            )


def shard_model(model: nn.Module, mesh: DeviceMesh, *, leave_trained: bool, files: WeightFiles | None = None) -> None:
    """Shards a prepared model's weights, block by block, in place; the tensors of the base model stay as they are.

    Args:
        model: The result of `prepare_model`, the same on every process.
        mesh: The processes.
        leave_trained: Whether trained weights stay whole on every process; their gradients need `average_gradients`.
        files: The source of the weights that are on the meta device: each process reads them one by one and keeps its
            shard.
    """
    device = torch.device(mesh.device_type)
    left = {p for p in model.parameters() if p.requires_grad} if leave_trained else set()
    read = {p: read_weight(p, name, files) for name, p in model.named_parameters() if p in left and p.is_meta}
    replace_parameters(model, read)
    left = {read.get(p, p) for p in left}
    # `fully_shard` moves parameters, so it gets new ones on the same memory: other runs share the base's
    own = {p: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters() if p not in left}
    replace_parameters(model, own)
    for block in [*find_blocks(model), model]:
        fully_shard(block, mesh=mesh, ignored_params=left)
    shards: dict[nn.Parameter, nn.Parameter] = {}
    for name, p in model.named_parameters():
        if p.is_meta:
            assert isinstance(p, DTensor)
            weight = read_weight(p, name, files).detach().to(device)
            shard = distribute_tensor(weight, p.device_mesh, p.placements, src_data_rank=None)
            shards[p] = nn.Parameter(shard, requires_grad=p.requires_grad)
    replace_parameters(model, shards)


def read_weight(parameter: nn.Parameter, name: str, files: WeightFiles | None) -> nn.Parameter:
    """Returns a parameter of a prepared model with the base's values, whole and on the CPU.

    A layer with a change and a module that trains hold the base's module one level deeper, as `base` or `trained`.
    """
    assert files is not None
    stored = name
    if files.shape(stored) is None:
        stored = ".".join(part for part in name.split(".") if part not in ("base", "trained"))
    return nn.Parameter(files.read(stored).to(parameter.dtype), requires_grad=parameter.requires_grad)


def replace_parameters(model: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replaces parameters wherever the model uses them, so that tied parameters stay tied."""
    for module in model.modules() if new else ():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter in new:
                setattr(module, name, new[parameter])


def find_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a model's blocks: the modules in its outermost lists of modules."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from find_blocks(child)


def average_gradients(model: nn.Module) -> None:
    """Replaces the gradients of weights that are whole on every process by their mean; FSDP does so for the others."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():  # together: one message instead of one for each of many small tensors
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def whole(tensor: Tensor) -> Tensor:
    """Returns a whole tensor on the CPU, gathered from all shards. All processes must call it together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns this process's shard of a whole tensor, cut as `other` is; the tensor itself if `other` is whole."""
    if not isinstance(other, DTensor):
        return tensor
    placed = tensor.to(other.device, other.dtype)
    return distribute_tensor(placed, other.device_mesh, other.placements, src_data_rank=None)


def copy_trained(model: nn.Module, to: nn.Module | None) -> None:
    """Copies the trained weights, whole, into a model that was prepared alike.

    All processes must call it together, because they gather the weights; those without a model pass None.
    """
    own = {} if to is None else dict(to.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter)
            if to is not None:
                replace_parameters(to, {own[name]: nn.Parameter(value)})


def _shard_moment(value: Any, parameter: Tensor) -> Any:
    """Returns a moment sharded as its parameter is; a step count as it is."""
    return shard_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
