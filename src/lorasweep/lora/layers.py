"""Layers with a low-rank change: each keeps the layer it replaces. `inject` puts them in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.functional import draw_keep_mask, lora_linear, scaling_factor


class LoraLinear(nn.Module):
    """A frozen `nn.Linear` plus scaling · B A x. At the start B is zero, so the layer is its base.

    Attributes:
        base: The layer that was replaced, its weights untouched and frozen.
        lora_a: (rank, d_in) in fp32, whatever the base's dtype; Kaiming-uniform with a = √5, as `nn.Linear` starts.
        lora_b: (d_out, rank) in fp32; zeros.
        scaling: Factor on the change.
        alpha: Strength the scaling was made from.
        dropout: Probability of dropping an input of A while training.
        dropout_generator: Random stream of the dropout masks; torch's own when None.
        unmerged_weight: The base's own weight while the base holds the merged one, else empty (see `merge_lora`).
            In a tuple, because it is neither a parameter nor in the state dict.
        config: What the layer was made from.
    """

    def __init__(
        self, base: nn.Linear, config: LoraConfig, *, rank: int, alpha: float, generator: torch.Generator | None = None
    ) -> None:
        """Wraps `base` without changing its values.

        Args:
            base: The layer to adapt.
            config: Dropout and scaling rule; what else it says about the model is `inject_lora`'s business.
            rank: Rank r of this layer's change.
            alpha: Strength α of this layer's change.
            generator: CPU random stream for A; torch's own when None.
        """
        super().__init__()
        self.base = base
        self.config = config
        self.alpha = alpha
        self.scaling = scaling_factor(alpha=alpha, rank=rank, rule=config.scaling)
        self.dropout = config.dropout
        self.dropout_generator: torch.Generator | None = None
        self.unmerged_weight: tuple[nn.Parameter, ...] = ()
        device = base.weight.device
        draw_on = device if device.type == "meta" else torch.device("cpu")  # the same A on every kind of device
        lora_a = torch.empty(rank, base.in_features, device=draw_on)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def merged(self) -> bool:
        """Whether the base's weight now contains the change."""
        return bool(self.unmerged_weight)

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return self.lora_a.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base's weight (d_out, d_in), for code that asks a linear layer for its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias (d_out,)."""
        return self.base.bias

    def change(self) -> Tensor:
        """The matrix scaling · B A, which is added to the base's weight (d_out, d_in), in fp32 or the base's wider dtype."""
        wide = torch.promote_types(self.base.weight.dtype, self.lora_a.dtype)
        return self.scaling * (self.lora_b.to(wide) @ self.lora_a.to(wide))

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the change's: (..., d_in) to (..., d_out)."""
        if self.merged:
            merged: Tensor = self.base(x)
            return merged
        keep = self._draw_keep_mask(x)
        return lora_linear(
            x,
            self.base.weight,
            self.base.bias,
            self.lora_a,
            self.lora_b,
            scaling=self.scaling,
            keep=keep,
            dropout=self.dropout,
        )

    def extra_repr(self) -> str:
        """What `print(model)` shows beside the base."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}, merged={self.merged}"

    def _draw_keep_mask(self, x: Tensor) -> Tensor | None:
        if not self.training or self.dropout == 0:
            return None
        return draw_keep_mask(x, dropout=self.dropout, generator=self.dropout_generator)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers of `model` that have a low-rank change, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
