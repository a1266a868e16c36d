"""A running mean of what trains, which is evaluated and saved in its place (`optim.ema_decay`)."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAveraging(lightning.Callback):
    """Exponential moving average of the trained parameters (Polyak and Juditsky 1992).

    Only what trains is averaged and kept twice; Lightning's own callback would copy the frozen base as well. Must come
    before the callbacks that save weights at the end of an evaluation, and after none that change them.
    """

    def __init__(self, decay: float) -> None:
        """Takes the share of the mean that is kept at each step."""
        self.update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.means: dict[str, Tensor] = {}
        self.aside: dict[str, Tensor] = {}
        """The weights that train, while the means are in their place."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts at the weights as they are, or goes on with the means of a checkpoint."""
        for name, parameter in _trained(pl_module).items():
            start = self.means.get(name, parameter.detach())
            self.means[name] = start.to(parameter.device, copy=True)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the means after each optimizer step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trained = _trained(pl_module)
            self.update(list(self.means.values()), [trained[name].detach() for name in self.means], 0)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Puts the means in place of the weights."""
        for name, parameter in _trained(pl_module).items():
            if name in self.means:
                self.aside[name] = parameter.detach().clone()
                parameter.data.copy_(self.means[name])

    def put_back(self, pl_module: lightning.LightningModule) -> None:
        """Puts the weights back, to be trained on."""
        trained = _trained(pl_module)
        for name, weights in self.aside.items():
            trained[name].data.copy_(weights)
        self.aside = {}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the weights that train as such, whichever are in place."""
        for name, weights in self.aside.items():
            checkpoint["state_dict"][name] = weights

    def state_dict(self) -> dict[str, Any]:
        """Returns the means, for a checkpoint."""
        return {"means": self.means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the means of a checkpoint."""
        self.means = dict(state_dict["means"])


class PutBack(lightning.Callback):
    """The last callback of an evaluation, by which everybody has saved the means."""

    def __init__(self, averaging: WeightAveraging) -> None:
        """Takes the callback that put them in place."""
        self.averaging = averaging

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Puts the weights back."""
        self.averaging.put_back(pl_module)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Puts the weights back when a run stops in an evaluation."""
        self.averaging.put_back(pl_module)


def _trained(module: lightning.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
