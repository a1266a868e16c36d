"""The LoRA layer of a pack, with one weight update per slot.

`write_slot` and `copy_slot` convert between a slot and a `LoraLayer`. All initialisation and all files use `LoraLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from lorasweep.lora.layer_kinds import matrix_shape
from lorasweep.lora.layers import AdaptedLayer, LoraLayer
from lorasweep.lora.packed.dropout import SlotStreams, check_rows
from lorasweep.lora.targets import Target


class PackedLoraLayer(AdaptedLayer):
    """A frozen layer and one weight update per slot, which applies to the rows of the slot only.

    A slot that does not adapt this layer gets the frozen layer's output. If a slot adapts parts of a fused projection,
    each part is a block of B, and a mask keeps the other elements of B at zero.

    Attributes:
        base: The frozen layer that was replaced.
        streams: The number of slots and their dropout streams. The whole pack shares this object.
        targets: For each slot, how it adapts this layer; None if it does not.
        capacity: The largest rank for which A and B have room without resizing.
        lora_a: (slots, capacity, d_in), in fp32 unless the pack was cast; rows beyond the slot's rank are zero.
        lora_b: (slots, d_out, capacity), of the same dtype; columns beyond the slot's rank are zero.
        b_mask: (slots, d_out, capacity), True where B trains; None if all of B trains.
    """

    b_mask: Tensor | None

    def __init__(self, base: nn.Module, streams: SlotStreams, *, dtype: torch.dtype, capacity: int = 0) -> None:
        """Creates a layer that no slot adapts yet, with A and B in `dtype`."""
        super().__init__(base)
        self.streams = streams
        self.targets: list[Target | None] = [None] * streams.num_slots
        (d_out, d_in), slots, device = matrix_shape(base), streams.num_slots, self.weight.device
        self.lora_a = nn.Parameter(torch.zeros(slots, capacity, d_in, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(slots, d_out, capacity, dtype=dtype, device=device))
        self.register_buffer("b_mask", None, persistent=False)
        self._factors: dict[object, Tensor] = {}

    @property
    def capacity(self) -> int:
        return self.lora_a.shape[1]

    @property
    def is_used(self) -> bool:
        return any(self.targets)

    @torch.no_grad()
    def write_slot(self, slot: int, layer: LoraLayer | None) -> None:
        """Copies a layer's update into a slot; None removes the slot's update. The parameter objects stay the same."""
        self.targets[slot] = None if layer is None else layer.target
        self.lora_a[slot], self.lora_b[slot] = 0, 0
        if layer is not None:
            lora_a, lora_b = layer.get_plain_matrices()
            rank = len(lora_a)
            if rank > self.capacity:
                self._resize(rank)
            self.lora_a[slot, :rank] = lora_a.to(self.lora_a)
            self.lora_b[slot, :, :rank] = lora_b.to(self.lora_b)
        self._apply_targets()

    def copy_slot(self, slot: int, base: nn.Module) -> LoraLayer | None:
        """Returns a copy of a slot's update as a LoRA layer around `base`; None if the slot has no update."""
        target = self.targets[slot]
        if target is None:
            return None
        layer = LoraLayer(base, target, device="meta")  # without values, because A and B are replaced below
        layer.lora_a = nn.Parameter(self.lora_a.detach()[slot, : target.total_rank].clone())
        lora_b = layer.gather_rows(self.lora_b.detach()[slot, :, : target.total_rank])
        layer.lora_b = nn.Parameter(lora_b.clone(memory_format=torch.contiguous_format))
        return layer

    @torch.no_grad()
    def keep_slots(self, keep: Sequence[int]) -> None:
        """Drops all other slots, and shrinks A and B to the largest remaining rank.

        The caller must drop the streams of the other slots.
        """
        self.targets = [self.targets[slot] for slot in keep]
        self.lora_a.data, self.lora_b.data = self.lora_a[list(keep)], self.lora_b[list(keep)]
        self._resize(max((target.total_rank for target in self.targets if target), default=0))
        self._apply_targets()

    def forward(self, x: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        check_rows(x, self.streams.num_slots)
        keep = self._draw_keep_mask(x)
        # the mask also makes the gradient zero outside the blocks
        lora_b = self.lora_b if self.b_mask is None else self.lora_b * self.b_mask
        return self.add_update(
            x, self.lora_a, lora_b, factor=self._get_factor(x, is_dropped=keep is not None), keep=keep
        )

    def extra_repr(self) -> str:
        return f"ranks={[target.rank if target else 0 for target in self.targets]}, capacity={self.capacity}"

    def _resize(self, capacity: int) -> None:
        common = min(capacity, self.capacity)
        slots, d_out, _ = self.lora_b.shape
        lora_a = self.lora_a.new_zeros(slots, capacity, self.lora_a.shape[2])
        lora_b = self.lora_b.new_zeros(slots, d_out, capacity)
        lora_a[:, :common], lora_b[:, :, :common] = self.lora_a[:, :common], self.lora_b[:, :, :common]
        # `.data` keeps the parameter objects, which an optimizer has. Gradients of the old shape are dropped.
        self.lora_a.data, self.lora_b.data = lora_a, lora_b
        self.lora_a.grad = self.lora_b.grad = None

    def _apply_targets(self) -> None:
        """Updates everything that is computed from `targets`: the cached factors and the mask of B."""
        self._factors.clear()
        self.b_mask = None
        if any(target and target.row_ranges for target in self.targets):
            self.b_mask = torch.ones(self.lora_b.shape, dtype=torch.bool, device=self.lora_b.device)
        for slot, target in enumerate(self.targets):
            if self.b_mask is not None and target and target.row_ranges:
                self.b_mask[slot] = False
                for (first, end), columns in target.iter_parts():
                    self.b_mask[slot, first:end, columns] = True

    def _draw_keep_mask(self, x: Tensor) -> Bool[Tensor, "*shape"] | None:
        rates = [target.config.dropout if target else 0.0 for target in self.targets]
        if not self.training or not any(rates) or isinstance(self.base, nn.Embedding):
            return None
        return self.streams.draw_keep_mask(torch.ones(x.shape, dtype=torch.bool, device=x.device), rates=rates)

    def _get_factor(self, x: Tensor, *, is_dropped: bool) -> Float[Tensor, "slots 1 1"]:
        """Returns each slot's scaling in fp32 or wider, divided by (1 - dropout) if inputs are dropped.

        The tensor is not a buffer, because casting the model to bf16 would round a buffer. It is cached, because
        creating a tensor on a GPU waits for the GPU.
        """
        dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else self.lora_a.dtype
        key = (dtype, x.device, is_dropped)
        if key not in self._factors:
            rates = [target.config.dropout if target and is_dropped else 0.0 for target in self.targets]
            scalings = [target.scaling if target else 0.0 for target in self.targets]
            factors = [scaling / (1 - rate) for scaling, rate in zip(scalings, rates, strict=True)]
            self._factors[key] = torch.tensor(factors, dtype=dtype, device=x.device)[:, None, None]
        return self._factors[key]


def packed_layers(model: nn.Module) -> dict[str, PackedLoraLayer]:
    """Returns the packed layers of `model` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLoraLayer)}
