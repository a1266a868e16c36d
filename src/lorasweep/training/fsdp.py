"""FSDP2 (`trainer.strategy=fsdp`): each process holds a shard of the weights of every block.

The weights of a block are whole only while the block computes. LoRA's A and B are small and stay whole everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from lorasweep.errors import ConfigError
from lorasweep.methods.method import replace_parameters


class FsdpStrategy(ModelParallelStrategy):
    """Lightning's strategy, but a checkpoint has only the trained weights, and they are whole instead of sharded.

    So any number of processes can resume from it. Lightning would also gather the frozen base, and would number the
    optimizer's state by all parameters of the model.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # Lightning then calls `load_optimizer_state_dict`

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: gather_whole(p) for name, p in self.lightning_module.named_parameters() if p.requires_grad}

    def load_checkpoint(
        self,
        checkpoint_path: _PATH,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:  # noqa: FBT001, FBT002
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        # the weights of slots are whole
        state = {
            name: shard_like(tensor, parameters[name]) if name in parameters else tensor
            for name, tensor in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = apply_to_collection(Strategy.optimizer_state(self, optimizer), Tensor, gather_whole)
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if "slots" in state:  # the state of slots is whole
                states.append(state)
                continue
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                index: {name: shard_like(value, parameters[index]) for name, value in values.items()}
                for index, values in state["state"].items()
            }
            states.append({**state, "state": moments})
        Strategy.load_optimizer_state_dict(self, {**checkpoint, "optimizer_states": states})


def check_shardable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(
                f"`trainer.strategy` must be ddp for a quantised base, but got 'fsdp', and {name!r} is "
                f"{parameter.dtype}. Use `trainer.strategy=ddp`."
            )


def shard_model(model: nn.Module, mesh: DeviceMesh, *, keep_trained_whole: bool) -> None:
    """Shards the weights of a prepared model in place, block by block. The tensors of the base model do not change.

    Args:
        model: The result of `prepare_model`, the same on every process.
        mesh: The processes.
        keep_trained_whole: Whether every process keeps the whole trained weights. `average_gradients` then averages
            their gradients.
    """
    unsharded = {p for p in model.parameters() if p.requires_grad} if keep_trained_whole else set()
    # `fully_shard` changes parameters in place, and other runs share the base's parameters. So it gets new parameters,
    # which share memory with the base's parameters.
    copies = {
        p: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters() if p not in unsharded
    }
    replace_parameters(model, copies)
    for block in [*find_blocks(model), model]:
        fully_shard(block, mesh=mesh, ignored_params=unsharded)


def find_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules in the outermost `ModuleList`s of a model."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from find_blocks(child)


def average_gradients(model: nn.Module) -> None:
    """Averages the gradients of whole weights over processes. FSDP itself averages the gradients of sharded weights."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
    if gradients:
        flat = parameters_to_vector(gradients)  # one message for many small tensors
        dist.all_reduce(flat)
        vector_to_parameters(flat / dist.get_world_size(), gradients)


def gather_whole(tensor: Tensor) -> Tensor:
    """Returns the whole tensor on the CPU, gathered from the shards. All processes must call it together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def shard_like(value: Any, parameter: Tensor) -> Any:
    """Returns this process's shard of a whole tensor.

    Returns the value unchanged if the parameter is whole, or if the shapes differ (an optimizer's step count).
    """
    if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
        return value
    placed = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)


def copy_trained_weights(model: nn.Module, target: nn.Module | None) -> None:
    """Copies the whole trained weights into `target`, a model that was prepared from the same settings.

    All processes must call it together, because they gather the weights. A process that needs no copy passes None.
    """
    copies = {} if target is None else dict(target.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = gather_whole(parameter)
            if target is not None:
                replace_parameters(target, {copies[name]: nn.Parameter(value)})
