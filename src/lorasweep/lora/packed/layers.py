"""The LoRA layer of a pack: the `LoraLayer`s of all slots around one frozen layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasweep.lora.functional import SlotGroup
from lorasweep.lora.layer_kinds import matrix_shape
from lorasweep.lora.layers import AdaptedLayer, LoraLayer
from lorasweep.lora.packed.slots import Slots, check_rows

MIN_GROUP_RANK = 16
"""Slots of at most this rank form one group. On a CPU, a product with fewer rows takes as long as one with 16."""


class PackedLoraLayer(AdaptedLayer):
    """A frozen layer and one weight update per slot, which applies to the rows of the slot only.

    A slot that does not adapt this layer gets the frozen layer's output.

    Attributes:
        base: The frozen layer that was replaced.
        slots: The slots of the pack. All layers of the pack share this object.
        layers: For each slot, the `LoraLayer` of its solo model; None if the slot does not adapt this layer. A list, so
            that they are not modules of the packed model.
        lora_a: All A. The parameters of a pack are those of its solo models.
        lora_b: All B.
    """

    def __init__(self, base: nn.Module, slots: Slots, layers: Sequence[LoraLayer | None]) -> None:
        super().__init__(base)
        self.slots = slots
        self.layers = list(layers)
        used = [layer for layer in layers if layer is not None]
        self.lora_a = nn.ParameterList(layer.lora_a for layer in used)
        self.lora_b = nn.ParameterList(layer.lora_b for layer in used)
        self._groups = group_like_ranks([layer.target.total_rank if layer else 0 for layer in layers])
        self._factors: dict[object, list[Tensor]] = {}

    def forward(self, x: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        check_rows(x, self.slots.num_slots)
        keep = self._draw_keep_mask(x)
        factors = self._get_factors(x, is_dropped=keep is not None)
        groups = [self._stack_group(group, factor) for group, factor in zip(self._groups, factors, strict=True)]
        return self.add_update(x, groups, keep=keep)

    def extra_repr(self) -> str:
        return f"ranks={[layer.target.total_rank if layer else 0 for layer in self.layers]}"

    def _stack_group(self, group: slice, factor: Tensor) -> SlotGroup:
        def stack(index: int) -> Tensor:
            pairs = [layer.get_plain_matrices() if layer else self._make_empty() for layer in self.layers[group]]
            rank = max(len(lora_a) for lora_a, _ in pairs)
            stacked: Tensor = _StackPadded.apply(index, rank, *[pair[index] for pair in pairs])  # type: ignore[no-untyped-call]
            return stacked

        lora_a, lora_b = (self.slots.share_stack((self, group.start, k), functools.partial(stack, k)) for k in (0, 1))
        return SlotGroup(lora_a, lora_b, factor)

    def _make_empty(self) -> tuple[Tensor, Tensor]:
        """Returns A and B of rank 0, for a slot that does not adapt this layer."""
        lora_a, lora_b = self.lora_a[0], self.lora_b[0]
        return lora_a.new_empty(0, lora_a.shape[1]), lora_b.new_empty(matrix_shape(self.base)[0], 0)

    def _draw_keep_mask(self, x: Tensor) -> Bool[Tensor, "*shape"] | None:
        rates = [layer.config.dropout if layer else 0.0 for layer in self.layers]
        if not self.training or not any(rates) or isinstance(self.base, nn.Embedding):
            return None
        return self.slots.draw_keep_mask(x, rates=rates)

    def _get_factors(self, x: Tensor, *, is_dropped: bool) -> list[Float[Tensor, "slots 1 1"]]:
        """Returns each group's scalings in fp32 or wider, divided by (1 - dropout) if inputs are dropped.

        The tensors are no buffers, because casting the model to bf16 would round buffers. They are cached, because
        creating a tensor on a GPU waits for the GPU.
        """
        dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else self.lora_a[0].dtype
        key = (dtype, x.device, is_dropped)
        if key not in self._factors:
            factors = [
                layer.scaling / (1 - layer.config.dropout * is_dropped) if layer else 0.0 for layer in self.layers
            ]
            stacked = torch.tensor(factors, dtype=dtype, device=x.device)[:, None, None]
            self._factors[key] = [stacked[group] for group in self._groups]
        return self._factors[key]


def group_like_ranks(ranks: Sequence[int]) -> list[slice]:
    """Returns neighbouring slots whose products are computed together, padded to the highest rank of the group.

    The ranks of a group are equal or at most `MIN_GROUP_RANK`. So sorting the slots by rank gives the fewest groups.
    """
    widths = [max(rank, MIN_GROUP_RANK) for rank in ranks]
    starts = [slot for slot, width in enumerate(widths) if slot == 0 or width != widths[slot - 1]]
    return [slice(first, end) for first, end in pairwise([*starts, len(ranks)])]


class _StackPadded(torch.autograd.Function):
    """Stacks matrices after padding them with zeros to the size `rank` in the dimension `dim`."""

    @staticmethod
    def forward(ctx: Any, dim: int, rank: int, *matrices: Tensor) -> Tensor:
        ctx.dim, ctx.ranks = dim, [matrix.shape[dim] for matrix in matrices]
        if all(width == rank for width in ctx.ranks):
            return torch.stack(matrices)
        shape = list(matrices[0].shape)
        shape[dim] = rank
        stacked = matrices[0].new_zeros(len(matrices), *shape)
        for target, matrix in zip(stacked, matrices, strict=True):
            target.narrow(dim, 0, matrix.shape[dim]).copy_(matrix)
        return stacked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(grad, ctx.ranks, strict=True)
        return None, None, *(part.narrow(ctx.dim, 0, rank) for part, rank in parts)


def packed_layers(model: nn.Module) -> dict[str, PackedLoraLayer]:
    """Returns the packed layers of `model` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLoraLayer)}
