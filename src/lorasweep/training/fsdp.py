"""FSDP2 (`trainer.strategy=fsdp`): each process holds a share of every block's weights, by `ModelParallelStrategy`.

A block's weights are whole only while it computes. What trains under LoRA is small and stays whole on every process.
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
    """Lightning's strategy, but checkpoints hold only what trains, whole, so that any number of processes resumes.

    *Differs* from `ModelParallelStrategy`, whose checkpoint gathers the frozen base too and numbers the optimizer's
    state by all parameters of the model.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Returns True: the optimizer's state comes from `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns what trains, whole."""
        assert self.lightning_module is not None
        return {name: whole(p) for name, p in self.lightning_module.named_parameters() if p.requires_grad}

    def load_checkpoint(
        self,
        checkpoint_path: _PATH,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> dict[str, Any]:
        """Reads a checkpoint on every process; nothing in it is unpickled."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:  # noqa: FBT001, FBT002
        """Takes this process's share of each tensor."""
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
        """Takes this process's share of each tensor."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                number: {name: _share(value, parameters[number]) for name, value in of.items()}
                for number, of in state["state"].items()
            }
            states.append({**state, "state": moments})
        Strategy.load_optimizer_state_dict(self, {**checkpoint, "optimizer_states": states})


def check_shardable(model: nn.Module) -> None:
    """Makes sure that a base model's weights can be cut into shares.

    Raises:
        ConfigError: They are stored in another form than floating-point numbers.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(
                f"`trainer.strategy` must be ddp for a quantised base, but got 'fsdp', and {name} is {parameter.dtype}."
            )


def shard_model(model: nn.Module, mesh: DeviceMesh, *, leave_trained: bool, files: WeightFiles | None = None) -> None:
    """Shares out a prepared model's weights, block by block, in place; the base's own tensors are left as they are.

    Args:
        model: As `prepare_model` gives it, the same on every process.
        mesh: The processes.
        leave_trained: Whether what trains stays whole on every process; `average_gradients` is then for it.
        files: Where the weights are that are on the meta device: each process reads them one by one and keeps its
            share.
    """
    device = torch.device(mesh.device_type)
    left = {p for p in model.parameters() if p.requires_grad} if leave_trained else set()
    read = {p: read_weight(p, name, files) for name, p in model.named_parameters() if p in left and p.is_meta}
    replace_parameters(model, read)
    left = {read.get(p, p) for p in left}
    # sharding moves the parameters that it is given, so it gets new ones on the same memory
    own = {p: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters() if p not in left}
    replace_parameters(model, own)
    for block in [*find_blocks(model), model]:
        fully_shard(block, mesh=mesh, ignored_params=left)
    shares: dict[nn.Parameter, nn.Parameter] = {}
    for name, p in model.named_parameters():
        if p.is_meta:
            assert isinstance(p, DTensor)
            weight = read_weight(p, name, files).detach().to(device)
            share = distribute_tensor(weight, p.device_mesh, p.placements, src_data_rank=None)
            shares[p] = nn.Parameter(share, requires_grad=p.requires_grad)
    replace_parameters(model, shares)


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
    """Puts parameters in place of others wherever the model uses them, so that tied ones stay tied."""
    for module in model.modules() if new else ():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter in new:
                setattr(module, name, new[parameter])


def find_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a model's blocks: what its outermost lists of modules hold."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from find_blocks(child)


def average_gradients(model: nn.Module) -> None:
    """Replaces the gradients of what is whole on every process by their mean, as FSDP does with what is sharded."""
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
    """Returns a tensor with every process's share of it, on the CPU. All processes must ask together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns this process's share of a whole tensor as `other` is shared out; the tensor itself where it is not."""
    if not isinstance(other, DTensor):
        return tensor
    placed = tensor.to(other.device, other.dtype)
    return distribute_tensor(placed, other.device_mesh, other.placements, src_data_rank=None)


def copy_trained(model: nn.Module, to: nn.Module | None) -> None:
    """Puts what trains, whole, into a model that was prepared alike. All processes must call it; one may have none."""
    own = {} if to is None else dict(to.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter)
            if to is not None:
                replace_parameters(to, {own[name]: nn.Parameter(value)})


def _share(value: Any, parameter: Tensor) -> Any:
    """Returns a moment as its parameter is shared out; a step count as it is."""
    return shard_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
