"""An exponential moving average of the trained weights, which is evaluated and saved in their place."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAveraging(lightning.Callback):
    """Exponential moving average of the trained parameters (Polyak and Juditsky 1992), for `optim.ema_decay`.

    Only the trained parameters are averaged and kept twice; Lightning's own callback would copy the frozen base too.
    A callback that saves weights at the end of an evaluation must come after this one, and call `restore_weights` when
    it has saved them.
    """

    def __init__(self, decay: float) -> None:
        """Takes the share of the mean that each step keeps."""
        self.update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.means: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        """The weights that train, while the means are in their place."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts at the present weights, or continues with the means of a checkpoint."""
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
                self.weights[name] = parameter.detach().clone()
                parameter.data.copy_(self.means[name])

    def restore_weights(self, pl_module: lightning.LightningModule) -> None:
        """Puts the weights back in place of the means, to train on."""
        trained = _trained(pl_module)
        for name, weights in self.weights.items():
            trained[name].data.copy_(weights)
        self.weights = {}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the weights that train, also while the means are in their place."""
        checkpoint["state_dict"] |= self.weights

    def state_dict(self) -> dict[str, Any]:
        """Returns the means, for a checkpoint."""
        return {"means": self.means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the means of a checkpoint."""
        self.means = dict(state_dict["means"])


def _trained(module: lightning.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
