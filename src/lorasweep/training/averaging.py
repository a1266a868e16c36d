"""An exponential moving average of the trained weights, which is evaluated and saved instead of them."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAveraging(lightning.Callback):
    """Exponential moving average of the trained parameters (Polyak and Juditsky 1992), for `optim.ema_decay`.

    Lightning's callback of this name would also copy the frozen base. Callbacks that save weights at the end of an
    evaluation must come before this one in the Trainer's list.
    """

    def __init__(self, decay: float) -> None:
        self.update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.means: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        """The weights that train, while the model holds the means."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trained = _trained(pl_module)
        for name, parameter in trained.items():  # `means` is not empty if a checkpoint was loaded
            self.means[name] = self.means.get(name, parameter.detach()).to(parameter.device, copy=True)

        @torch.no_grad()
        def update_means(*_: Any) -> None:
            self.update(list(self.means.values()), [trained[name].detach() for name in self.means], 0)

        for optimizer in trainer.optimizers:  # before any callback writes a checkpoint of the step
            optimizer.register_step_post_hook(update_means)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for name, parameter in _trained(pl_module).items():
            if name in self.means:
                self.weights[name] = parameter.detach().clone()
                parameter.data.copy_(self.means[name])

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trained = _trained(pl_module)
        for name, weights in self.weights.items():
            trained[name].data.copy_(weights)
        self.weights = {}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["state_dict"] |= self.weights  # training resumes from the weights, not from the means

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.means = dict(state_dict["means"])


def _trained(module: lightning.LightningModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
