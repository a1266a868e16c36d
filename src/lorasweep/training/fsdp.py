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


def shard_model(model: nn.Module, mesh: DeviceMesh, *, leave_trained: bool) -> None:
    """Shares out a prepared model's weights, block by block, in place; the base's own tensors are left as they are.

    Args:
        model: As `prepare_model` gives it, on the CPU and the same on every process.
        mesh: The processes.
        leave_trained: Whether what trains stays whole on every process; `average_gradients` is then for it.
    """
    left = {p for p in model.parameters() if p.requires_grad} if leave_trained else set()
    own_parameters(model, left)
    for block in [*find_blocks(model), model]:
        fully_shard(block, mesh=mesh, ignored_params=left)


def own_parameters(model: nn.Module, besides: set[nn.Parameter]) -> None:
    """Puts new parameters on the same memory in place of a model's: sharding moves those that it is given."""
    own: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in besides:
                fresh = own.setdefault(id(parameter), nn.Parameter(parameter.detach(), parameter.requires_grad))
                setattr(module, name, fresh)


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
    """Copies what trains into a whole model that was prepared alike. All processes must call it; one may have none."""
    own = {} if to is None else dict(to.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter)
            if to is not None:
                own[name].data.copy_(value)


def _share(value: Any, parameter: Tensor) -> Any:
    """Returns a moment as its parameter is shared out; a step count as it is."""
    return shard_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
