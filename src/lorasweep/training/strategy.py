"""One run on several processes, for Lightning's Trainer: gradients summed over ranks, weights whole or sharded.

Each rank has a Trainer on its own device and its share of every batch's rows; `ranks` has how they agree. The loss of
a row is divided by the weight of the whole step, so gradients add up to those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lorasweep.training.module import TrainingModule
from lorasweep.training.ranks import Ranks
from lorasweep.training.shard import shard_like, whole


class RankStrategy(SingleDeviceStrategy):
    """One of several ranks: only the first writes, and sharded tensors go whole into a checkpoint and come out of it.

    *Differs* from Lightning's DDPStrategy and ModelParallelStrategy: nothing but the sums of `SumGradients`, and what a
    sharded model does in its passes, makes a rank wait for the others. Theirs wait inside of the backward pass and,
    since 2.6, inside of the handler of SIGTERM, where one that failed, or alone was signalled, leaves them hanging.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        super().__init__(device=device)
        self.ranks = ranks

    @property
    def is_global_zero(self) -> bool:
        """Whether this rank writes."""
        return self.ranks.is_first

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns what trains, whole; never the base."""
        assert self.lightning_module is not None
        trained = {name for name, parameter in self.lightning_module.named_parameters() if parameter.requires_grad}
        state = self.lightning_module.state_dict()
        return {name: whole(tensor) for name, tensor in state.items() if name in trained}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:  # noqa: FBT001, FBT002
        """Takes this rank's share of each tensor."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: shard_like(tensor, own[name]) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state of an optimizer, whole."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        moments = {
            number: {name: whole(value) if isinstance(value, Tensor) else value for name, value in of.items()}
            for number, of in state["state"].items()
        }
        return state | {"state": moments}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's share of each tensor."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            moments = {
                number: {
                    name: shard_like(value, parameters[number]) if _fits(value, parameters[number]) else value
                    for name, value in of.items()
                }
                for number, of in state["state"].items()
            }
            states.append(state | {"state": moments})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def teardown(self) -> None:
        """Leaves a sharded model where it is: it is of no use elsewhere, and may be evaluated again."""
        module = self.lightning_module
        if module is None or not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            super().teardown()
            return
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()


class SumGradients(lightning.Callback):
    """Sums over ranks, once per optimizer step: gradients of what is whole on each, losses, and tokens.

    Ranks meet first, after their backward passes: where one of them failed, none waits for its part of the sum.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        """Replaces each gradient by the sum; clipping comes after it."""
        assert isinstance(pl_module, TrainingModule)
        trained = [p for p in pl_module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if self.ranks.any(any(p.grad is None for p in trained)):
            self._fill_gaps(trained)
        stats = pl_module.step_stats()
        self.ranks.sum([*(p.grad for p in trained if p.grad is not None), stats])
        pl_module.note_totals(stats)

    def _fill_gaps(self, trained: list[nn.Parameter]) -> None:
        """Gives zeros to what a rank did not use and another did, so that all sum the same; the rest keeps none."""
        if not trained:
            return
        used = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        self.ranks.sum([used])
        for parameter, count in zip(trained, used.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _fits(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
