"""The LoRA layer of a pack: the `LoraLayer`s of all slots around one frozen layer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from lorasweep.lora.functional import SlotGroup
from lorasweep.lora.layer_kinds import is_linear, matrix_shape
from lorasweep.lora.layers import AdaptedLayer, LoraLayer
from lorasweep.lora.packed.slots import Slots, check_rows
from lorasweep.lora.packed.stacks import MatrixStack

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
        self._stacks: list[tuple[MatrixStack, MatrixStack]] = []

    def forward(self, x: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        # slot-major rows: then the rows of a slot, and of a group of slots, are one view of x without a copy
        check_rows(x, self.slots.num_slots)
        keep = self._draw_keep_mask(x)
        factors = self._get_factors(x, is_dropped=keep is not None)
        return self.add_update(x, self._stack_groups(factors), keep=keep)

    def extra_repr(self) -> str:
        return f"ranks={[layer.target.total_rank if layer else 0 for layer in self.layers]}"

    def _stack_groups(self, factors: Sequence[Tensor]) -> list[SlotGroup]:
        collectors = self.slots.collectors
        if collectors is None:
            return [self._stack_group(group, factor) for group, factor in zip(self._groups, factors, strict=True)]
        # Filled at the first call of a step: parameters change only between steps, and a layer that is called twice,
        # or in several micro-batches, adds its gradients to the same leaves.
        if self not in collectors:
            dtype, device = self._get_stack_dtype(), self.lora_a[0].device
            if not self._stacks or not self._stacks[0][0].fits(dtype, device):
                make = functools.partial(MatrixStack, shape=matrix_shape(self.base), like=self.lora_a[0], dtype=dtype)
                self._stacks = [
                    (make(self.layers[group], "a"), make(self.layers[group], "b")) for group in self._groups
                ]
            for stack in self._iter_stacks():
                stack.fill()
            collectors[self] = self._collect_gradients
        return [
            SlotGroup(stack_a.leaf, stack_b.leaf, factor, (stack_a.values, stack_b.values))
            for (stack_a, stack_b), factor in zip(self._stacks, factors, strict=True)
        ]

    def _iter_stacks(self) -> Iterator[MatrixStack]:
        return itertools.chain.from_iterable(self._stacks)

    def _collect_gradients(self) -> None:
        for stack in self._iter_stacks():
            stack.collect_gradients()

    def _get_stack_dtype(self) -> torch.dtype:
        """Returns the dtype in which `lora_linear` computes, and that of the parameters for all other products."""
        device_type = self.weight.device.type
        is_own = self.calls_base or not is_linear(self.base)
        if not is_own and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        dtype: torch.dtype = (self.lora_a[0] if is_own else self.weight).dtype
        return dtype

    def _stack_group(self, group: slice, factor: Tensor) -> SlotGroup:
        """Stacks the matrices of a group with plain operations of torch, so that autograd differentiates them."""
        pairs = [layer.get_plain_matrices() if layer else self._make_empty() for layer in self.layers[group]]
        rank = max(len(lora_a) for lora_a, _ in pairs)
        lora_a = torch.stack([nn.functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in pairs])
        lora_b = torch.stack([nn.functional.pad(b, (0, rank - b.shape[1])) for _, b in pairs])
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

        The tensors are no buffers, because casting the model to bf16 would round buffers.
        """
        dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else self.lora_a[0].dtype
        values = [layer.scaling / (1 - layer.config.dropout * is_dropped) if layer else 0.0 for layer in self.layers]
        stacked = self.slots.share_factors(tuple(values), dtype=dtype, device=x.device)
        return [stacked[group] for group in self._groups]


def group_like_ranks(ranks: Sequence[int]) -> list[slice]:
    """Returns neighbouring slots whose products are computed together, padded to the highest rank of the group.

    The ranks of a group are equal or at most `MIN_GROUP_RANK`. So sorting the slots by rank gives the fewest groups.
    """
    widths = [max(rank, MIN_GROUP_RANK) for rank in ranks]
    starts = [slot for slot, width in enumerate(widths) if slot == 0 or width != widths[slot - 1]]
    return [slice(first, end) for first, end in pairwise([*starts, len(ranks)])]


def packed_layers(model: nn.Module) -> dict[str, PackedLoraLayer]:
    """Returns the packed layers of `model` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLoraLayer)}
