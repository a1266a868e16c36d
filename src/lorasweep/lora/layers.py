"""The LoRA layer: a frozen layer with a trainable low-rank weight update ΔW = scaling · B A. B A starts at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from lorasweep.lora.functional import SlotGroup, linear_update, lora_linear, split_by_group
from lorasweep.lora.layer_kinds import has_custom_forward, matrix_shape, matrix_to_weight, weight_to_matrix
from lorasweep.lora.targets import Target


class AdaptedLayer(nn.Module):
    """Base class of the LoRA layers: a frozen layer, and a weight update that is added to its output.

    Attributes:
        base: The frozen layer that was replaced.
        calls_base: Whether the forward pass calls a linear base instead of using its weight directly, because the base
            has hooks or a custom forward (a quantised layer). If False, hooks that are added later are not called.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.calls_base = has_custom_forward(base)

    @property
    def weight(self) -> Tensor:
        """The base's weight. Some models read the dtype or device of a layer's weight."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Float[Tensor, " d_out"] | None:
        return getattr(self.base, "bias", None)

    def add_update(
        self, x: Shaped[Tensor, "rows ..."], groups: Sequence[SlotGroup], *, keep: Bool[Tensor, "rows ..."] | None
    ) -> Float[Tensor, "rows ..."]:
        """Returns the base's output for x plus B A (x · keep), in the dtype of the base's output.

        `keep` is False for each input that is dropped before A.
        """
        if not self.calls_base:
            return lora_linear(x, weight_to_matrix(self.base, self.weight), self.bias, groups, keep=keep)
        y: Tensor = self.base(x)
        keeps = [None] * len(groups) if keep is None else split_by_group(keep, groups)
        updates = [
            linear_update(rows.to(y.dtype), group, keep=keep_rows)
            for rows, group, keep_rows in zip(split_by_group(x, groups), groups, keeps, strict=True)
        ]
        return y + torch.cat(updates).to(y.dtype)


class LoraLayer(AdaptedLayer):
    """A frozen layer with one weight update, scaling · B A. While B A is zero, its output equals the frozen layer's.

    Attributes:
        target: How the layer is adapted. `config`, `rank` and `scaling` are copied from it.
        lora_a: (rank, d_in) in fp32, also if the base has another dtype.
        lora_b: (d_out, rank) in fp32.
    """

    def __init__(
        self,
        base: nn.Module,
        target: Target,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Creates A and B on `device` (the base's if None), drawn from the CPU stream `generator`.

        On the device `meta` they have no values.
        """
        super().__init__(base)
        self.target, self.config = target, target.config
        self.rank, self.scaling = target.rank, target.scaling
        device = self.weight.device if device is None else torch.device(device)
        d_out, d_in = matrix_shape(base)
        if device.type != "meta":
            lora_a, lora_b = draw_matrices(d_out=d_out, d_in=d_in, rank=self.rank, generator=generator)
        else:
            lora_a, lora_b = torch.empty(self.rank, d_in, device=device), torch.empty(d_out, self.rank, device=device)
        self.lora_a = nn.Parameter(lora_a.to(device, torch.float32))
        self.lora_b = nn.Parameter(lora_b.to(device, torch.float32))

    @property
    def dropout_rate(self) -> float:
        return self.config.dropout

    def forward(self, x: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        dropout = self.config.dropout
        is_dropped = self.training and dropout > 0
        keep = torch.rand(x.shape, device=x.device) >= dropout if is_dropped else None
        lora_b = self.lora_b * self.compute_factor(is_training=self.training)
        return self.add_update(x, [SlotGroup(self.lora_a[None], lora_b[None])], keep=keep)

    def compute_factor(self, *, is_training: bool) -> float:
        """Returns the factor of B A x: the scaling, divided by (1 - dropout) in training."""
        return self.scaling / (1 - self.config.dropout) if is_training else self.scaling

    def compute_weight_update(self) -> Float[Tensor, "d_out d_in"]:
        """Returns ΔW = scaling · B A, in fp32 or the base's wider dtype."""
        dtype = self.lora_a.dtype
        if self.weight.is_floating_point():
            dtype = torch.promote_types(self.weight.dtype, dtype)
        return self.scaling * (self.lora_b.to(dtype) @ self.lora_a.to(dtype))

    @torch.no_grad()
    def compute_merged_weight(self) -> Tensor:
        """Returns W0 + ΔW in the base's shape and dtype, rounded only once."""
        update = self.compute_weight_update()
        matrix = weight_to_matrix(self.base, self.weight).to(update.dtype) + update
        return matrix_to_weight(self.base, matrix).to(self.weight.dtype).contiguous()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Returns the LoRA layers of `model` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def split_lora_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Returns all A, all B, and the other trainable parameters (heads), each in the model's order.

    LoRA+ (arXiv 2402.12354, section 4) trains B with `optim.lr_ratio_b` times the learning rate of A.
    """
    layers = lora_layers(model).values()
    a, b = [layer.lora_a for layer in layers], [layer.lora_b for layer in layers]
    lora_ids = {id(parameter) for parameter in (*a, *b)}
    return a, b, [p for p in model.parameters() if p.requires_grad and id(p) not in lora_ids]


def draw_matrices(
    *, d_out: int, d_in: int, rank: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
    """Returns A and B in fp32 on the CPU, with B A = 0.

    A is uniform within ±1/√d_in (Kaiming-uniform with a = √5) and B zero, as in LoRA's code (github.com/microsoft/LoRA,
    `loralib/layers.py`).
    """
    lora_a = torch.empty(rank, d_in)
    torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
    return lora_a, torch.zeros(d_out, rank)
