"""`trainer.strategy=fsdp`: the weights of each block shared out over the ranks (FSDP2, `fully_shard`).

A block's weights are whole only while it computes. What trains under LoRA is small and stays whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lorasweep.config.run import RunConfig
from lorasweep.errors import ConfigError
from lorasweep.lora import LoraConfig


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


def shard_model(model: nn.Module, config: RunConfig, *, device: torch.device) -> None:
    """Shares out a prepared model's weights, block by block, in place; the base's own tensors are left as they are.

    Gradients are summed over the ranks, not averaged.

    Args:
        model: As `prepare_model` gives it, on the CPU and the same on every rank.
        config: The run's; under LoRA what trains is left whole.
        device: This rank's.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    ignored = {p for p in model.parameters() if p.requires_grad} if isinstance(config.method, LoraConfig) else set()
    own_parameters(model, ignored)
    for block in [*find_blocks(model), model]:
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


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


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor with every rank's share of it, on the CPU. All ranks must ask together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns this rank's share of a whole tensor as `other` is shared out; the tensor itself where it is not."""
    if not isinstance(other, DTensor):
        return tensor
    placed = tensor.to(other.device, other.dtype)
    return distribute_tensor(placed, other.device_mesh, other.placements, src_data_rank=None)


def copy_trained(model: nn.Module, to: nn.Module | None) -> None:
    """Copies what trains into a whole model that was prepared alike. All ranks must call it; one may have none."""
    own = {} if to is None else dict(to.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter)
            if to is not None:
                own[name].data.copy_(value)
