"""Layers with one low-rank change per slot, one class per kind: the stacked twins of `lora.layers`.

A slot's change goes in and comes out as an ordinary `LoraLayer`, so that how it starts and how it is stored is said in
one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasweep.config.method import LoraConfig
from lorasweep.lora.functional import Rows
from lorasweep.lora.kinds import matrix_shape, weight_to_matrix
from lorasweep.lora.layers import LoraConv2d, LoraEmbedding, LoraLayer, LoraLinear, layer_class
from lorasweep.lora.packed.dropout import SlotStreams, check_rows
from lorasweep.lora.packed.functional import masked_b, packed_change, packed_lora_linear


@dataclass(frozen=True, kw_only=True)
class SlotChange:
    """How one slot adapts one layer; the attributes of a `LoraLayer` from which another can be built."""

    config: LoraConfig
    rank: int
    alpha: float
    rows: Rows
    scaling: float
    width: int
    """Rows of A: the rank, times the parts of a fused projection."""


class PackedLoraLayer(nn.Module):
    """A frozen layer plus, for the rows of each slot, that slot's change; nothing for a slot that does not adapt it.

    The parts of a fused projection stand in blocks of B; the zeros around them are kept zero by a mask.

    Attributes:
        base: The layer that was replaced, its weights untouched and frozen.
        streams: Shared by the pack: number of slots, and the streams of the dropout masks.
        changes: How each slot adapts this layer; None where it does not.
        lora_a: (slots, capacity, d_in) in fp32; zero below a slot's own rank.
        lora_b: (slots, d_out, capacity) in fp32; zero beyond a slot's own rank.
        b_mask: (slots, d_out, capacity), where B trains; None when that is everywhere.
    """

    holds_change = True
    b_mask: Tensor | None

    def __init__(self, base: nn.Module, streams: SlotStreams, *, dtype: torch.dtype, capacity: int = 0) -> None:
        """Makes the layer without a change.

        Args:
            base: The layer to adapt.
            streams: Of the pack.
            dtype: Of A and B; fp32, unless the pack was cast to another.
            capacity: Rank up to which slots can be filled without growing.
        """
        super().__init__()
        self.base = base
        self.streams = streams
        self.changes: list[SlotChange | None] = [None] * streams.num_slots
        (d_out, d_in), slots = matrix_shape(base), streams.num_slots
        device = self.weight.device
        self.lora_a = nn.Parameter(torch.zeros(slots, capacity, d_in, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(slots, d_out, capacity, dtype=dtype, device=device))
        self.register_buffer("b_mask", None, persistent=False)
        self._factors_of: dict[object, Tensor] = {}

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that asks a layer for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias (d_out,), if it has one."""
        return getattr(self.base, "bias", None)

    @property
    def capacity(self) -> int:
        """Rank up to which a slot can be filled without growing."""
        return self.lora_a.shape[1]

    @property
    def is_used(self) -> bool:
        """Whether any slot adapts this layer."""
        return any(change is not None for change in self.changes)

    @torch.no_grad()
    def put(self, slot: int, change: LoraLayer | None) -> bool:
        """Gives a slot the values of this layer, or no change.

        Returns:
            Whether A and B had to grow, which replaces their memory but not the parameters.
        """
        self.lora_a[slot], self.lora_b[slot] = 0, 0
        self.changes[slot] = None
        grows = False
        if change is not None:
            lora_a, lora_b = change.matrices()
            width = lora_a.shape[0]
            grows = width > self.capacity
            if grows:
                self._resize(width)
            self.lora_a[slot, :width] = lora_a.to(self.lora_a)
            self.lora_b[slot, :, :width] = lora_b.to(self.lora_b)
            self.changes[slot] = _describe(change, width)
        self._changed()
        return grows

    def take(self, slot: int, base: nn.Module) -> LoraLayer | None:
        """A slot's change as an ordinary layer around `base`, with copies of its values; None where there is none."""
        change = self.changes[slot]
        if change is None:
            return None
        layer = layer_class(base)(
            base, change.config, rank=change.rank, alpha=change.alpha, rows=change.rows, device="meta"
        )
        lora_b = self.lora_b.detach()[slot, :, : change.width]
        if change.rows:
            blocks = enumerate(change.rows)
            lora_b = torch.cat([lora_b[first:past, _block(i, change.rank)] for i, (first, past) in blocks])
        layer.lora_a = nn.Parameter(self.lora_a.detach()[slot, : change.width].clone())
        layer.lora_b = nn.Parameter(lora_b.clone(memory_format=torch.contiguous_format))
        return layer

    @torch.no_grad()
    def keep_slots(self, keep: Sequence[int]) -> None:
        """Drops the other slots, and the capacity that no slot left needs. The streams are the caller's to drop."""
        self.changes = [self.changes[slot] for slot in keep]
        self.lora_a.data, self.lora_b.data = self.lora_a[list(keep)], self.lora_b[list(keep)]
        self._resize(max((change.width for change in self.changes if change is not None), default=0))
        self._changed()

    def extra_repr(self) -> str:
        """What `print(model)` shows beside the base."""
        ranks = [0 if change is None else change.rank for change in self.changes]
        return f"ranks={ranks}, capacity={self.capacity}"

    def _resize(self, capacity: int) -> None:
        kept = min(capacity, self.capacity)
        slots, d_out, _ = self.lora_b.shape
        lora_a = self.lora_a.new_zeros(slots, capacity, self.lora_a.shape[2])
        lora_b = self.lora_b.new_zeros(slots, d_out, capacity)
        lora_a[:, :kept], lora_b[:, :, :kept] = self.lora_a[:, :kept], self.lora_b[:, :, :kept]
        self.lora_a.data, self.lora_b.data = lora_a, lora_b
        self.lora_a.grad = self.lora_b.grad = None

    def _changed(self) -> None:
        self._factors_of.clear()
        self.b_mask = self._draw_b_mask() if any(c is not None and c.rows for c in self.changes) else None

    def _draw_b_mask(self) -> Tensor:
        mask = torch.ones(self.lora_b.shape, dtype=torch.bool, device=self.lora_b.device)
        for slot, change in enumerate(self.changes):
            if change is not None and change.rows:
                mask[slot] = False
                for i, (first, past) in enumerate(change.rows):
                    mask[slot, first:past, _block(i, change.rank)] = True
        return mask

    def _rates(self) -> list[float]:
        return [0.0 if change is None else change.config.dropout for change in self.changes]

    def _draw_keep_mask(self, x: Tensor) -> Tensor | None:
        check_rows(x, self.streams.num_slots)
        rates = self._rates()
        if not self.training or not any(rates):
            return None
        return self.streams.drop(torch.ones(x.shape, dtype=torch.bool, device=x.device), rates=rates)

    def _factors(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Scaling of each slot (slots,), over 1 - dropout where inputs are dropped; in fp32 or x's wider dtype.

        Kept as numbers and made tensors when used: a buffer would be rounded when the model is cast to bf16.
        """
        dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else self.lora_a.dtype
        key = (dtype, x.device, keep is not None)
        if key not in self._factors_of:
            rates = self._rates() if keep is not None else [0.0] * len(self.changes)
            scalings = [0.0 if change is None else change.scaling for change in self.changes]
            factors = [scaling / (1 - rate) for scaling, rate in zip(scalings, rates, strict=True)]
            self._factors_of[key] = torch.tensor(factors, dtype=dtype, device=x.device)
        return self._factors_of[key]


class PackedLoraLinear(PackedLoraLayer):
    """A packed `nn.Linear` or transformers' `Conv1D`; a base with a forward of its own computes its output itself."""

    def __init__(self, base: nn.Module, streams: SlotStreams, *, dtype: torch.dtype, capacity: int = 0) -> None:
        """See `PackedLoraLayer`."""
        super().__init__(base, streams, dtype=dtype, capacity=capacity)
        self.calls_base = False

    def put(self, slot: int, change: LoraLayer | None) -> bool:
        """See `PackedLoraLayer.put`."""
        if change is not None:
            assert isinstance(change, LoraLinear)
            self.calls_base = change.calls_base
        return super().put(slot, change)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the changes': (slots · rows, ..., d_in) to (slots · rows, ..., d_out)."""
        keep = self._draw_keep_mask(x)
        if self.calls_base:
            y: Tensor = self.base(x)
            seen = x.to(y.dtype)
            factors = self._factors(seen, keep)
            return y + packed_change(seen, self.lora_a, self.lora_b, factors=factors, keep=keep, b_mask=self.b_mask)
        return packed_lora_linear(
            x,
            weight_to_matrix(self.base, self.weight),
            self.bias,
            self.lora_a,
            self.lora_b,
            factors=self._factors(x, keep),
            keep=keep,
            b_mask=self.b_mask,
        )


class PackedLoraEmbedding(PackedLoraLayer):
    """A packed `nn.Embedding`: a column of the slot's A, looked up, times its B is added to the row."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The base's rows plus the changes': (slots · rows, ...) of token ids to (slots · rows, ..., d_out)."""
        slots = self.streams.num_slots
        check_rows(tokens, slots)
        output: Tensor = self.base(tokens)
        slot = torch.arange(slots, device=tokens.device)[:, None]
        looked_up = self.lora_a[slot, :, tokens.reshape(slots, -1)]  # (slots, tokens, rank)
        scale = self._factors(tokens) * getattr(self.base, "embed_scale", 1.0)
        change = looked_up @ masked_b(self.lora_b, self.b_mask).mT * scale[:, None, None]
        return output + change.view(output.shape).to(output.dtype)


class PackedLoraConv2d(PackedLoraLayer):
    """A packed `nn.Conv2d`: each slot's A is a convolution with the base's kernel, its B one of 1 × 1."""

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the changes': (slots · rows, channels, height, width)."""
        base = self.base
        assert isinstance(base, nn.Conv2d)
        keep = self._draw_keep_mask(x)
        lora_a, lora_b = self.lora_a.to(x.dtype), masked_b(self.lora_b, self.b_mask).to(x.dtype)
        factors = self._factors(x, keep)
        changes = []
        for slot, rows in self.streams.rows(x if keep is None else x * keep):
            u = base._conv_forward(rows, lora_a[slot].view(-1, *base.weight.shape[1:]), None)
            u = (u * factors[slot]).to(x.dtype)
            changes.append(nn.functional.conv2d(u, lora_b[slot, :, :, None, None]))
        output: Tensor = base(x) + torch.cat(changes)
        return output


def packed_class(layer: LoraLayer) -> type[PackedLoraLayer]:
    """Which of the classes above holds a stack of such layers."""
    if isinstance(layer, LoraEmbedding):
        return PackedLoraEmbedding
    return PackedLoraConv2d if isinstance(layer, LoraConv2d) else PackedLoraLinear


def packed_layers(model: nn.Module) -> dict[str, PackedLoraLayer]:
    """The packed layers of `model`, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLoraLayer)}


def _describe(layer: LoraLayer, width: int) -> SlotChange:
    return SlotChange(
        config=layer.config,
        rank=layer.rank,
        alpha=layer.alpha,
        rows=layer.rows,
        scaling=layer.scaling,
        width=width,
    )


def _block(index: int, rank: int) -> slice:
    """Columns of B that belong to a part of a fused projection."""
    return slice(index * rank, (index + 1) * rank)
