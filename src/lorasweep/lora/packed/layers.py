"""The modules of a pack: a frozen layer or module with the weights of all slots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten  # see lora.fully_trained

from lorasweep.lora.fully_trained import TrainedModule, call_in_precision_of
from lorasweep.lora.functional import SlotGroup, UpdateFactor
from lorasweep.lora.layer_kinds import is_linear, matrix_shape
from lorasweep.lora.layers import AdaptedLayer, LoraLayer
from lorasweep.lora.packed.slots import Slots, check_rows

MIN_GROUP_RANK = 16
"""Slots of at most this rank form one group. On a CPU, a product with fewer rows takes as long as one with 16."""


class SlotRows:
    """A module whose inputs have the rows of all slots, slot after slot."""

    slots: Slots

    @property
    def num_groups(self) -> int:
        return self.slots.num_slots

    def note_lengths(self, lengths: Sequence[int]) -> None:
        self.slots.note_lengths(lengths)


class PackedLoraLayer(SlotRows, AdaptedLayer):
    """A frozen layer and one weight update per slot, which applies to the rows of the slot only.

    A slot that does not adapt this layer gets the frozen layer's output.

    Attributes:
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
        self.ranks = [layer.rank if layer else 0 for layer in layers]
        self._groups = group_like_ranks(self.ranks)
        self._stacks: list[tuple[MatrixStack, MatrixStack]] = []

    def forward(self, x: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        # slot-major rows: then the rows of a slot, and of a group of slots, are one view of x without a copy
        check_rows(x, self.slots.num_slots)
        rates = [layer.config.dropout if layer else 0.0 for layer in self.layers]
        is_dropped = self.training and any(rates) and not isinstance(self.base, nn.Embedding)
        keep = self.slots.draw_keep_mask(x, rates=rates) if is_dropped else None
        # tensors in fp32 or wider, and no buffers, because casting the model to bf16 would round buffers
        dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else self.lora_a[0].dtype
        values = [layer.scaling / (1 - layer.config.dropout * is_dropped) if layer else 0.0 for layer in self.layers]
        shared = self.slots.share_factors(tuple(values), dtype=dtype, device=x.device)
        # a number does not change the dtype of a product, so torch makes no copy in fp32
        factors = [shared[group] if len({*values[group]}) > 1 else values[group.start] for group in self._groups]
        return self.add_update(x, self._stack_groups(factors), keep=keep)

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"

    @property
    def dropout_rate(self) -> float:
        """The largest rate of a slot."""
        return max(layer.config.dropout for layer in self.layers if layer)

    def _stack_groups(self, factors: Sequence[UpdateFactor]) -> list[SlotGroup]:
        collectors = self.slots.collectors
        if collectors is None:
            return [self._stack_group(group, factor) for group, factor in zip(self._groups, factors, strict=True)]
        # Filled at the first call of a step: parameters change only between steps, and a layer that is called twice,
        # or in several micro-batches, adds its gradients to the same leaves.
        if self not in collectors:
            self._fill_stacks()
            collectors[self] = self._collect_gradients
        return [
            SlotGroup(stack_a.leaf, stack_b.leaf, factor, (stack_a.values, stack_b.values))
            for (stack_a, stack_b), factor in zip(self._stacks, factors, strict=True)
        ]

    def _fill_stacks(self) -> None:
        """Copies the parameters into the stacks, which have the dtype of the products that `add_update` computes."""
        like, device_type = self.lora_a[0], self.weight.device.type
        if self.calls_base or not is_linear(self.base):
            dtype = like.dtype
        elif torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        else:
            dtype = self.weight.dtype
        if not self._stacks or not self._stacks[0][0].fits(dtype, like.device):
            d_out, d_in = matrix_shape(self.base)
            self._stacks = [
                (
                    MatrixStack(self.layers[group], "a", width=d_in, like=like, dtype=dtype),
                    MatrixStack(self.layers[group], "b", width=d_out, like=like, dtype=dtype),
                )
                for group in self._groups
            ]
        for stack in itertools.chain.from_iterable(self._stacks):
            stack.fill()

    def _collect_gradients(self) -> None:
        for stack in itertools.chain.from_iterable(self._stacks):
            stack.collect_gradients()

    def _stack_group(self, group: slice, factor: UpdateFactor) -> SlotGroup:
        """Stacks the matrices of a group with plain operations of torch, so that autograd differentiates them."""
        d_out, d_in = matrix_shape(self.base)
        empty = self.lora_a[0].new_empty(0, d_in), self.lora_b[0].new_empty(d_out, 0)
        pairs = [(layer.lora_a, layer.lora_b) if layer else empty for layer in self.layers[group]]
        rank = max(len(lora_a) for lora_a, _ in pairs)
        lora_a = torch.stack([nn.functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in pairs])
        lora_b = torch.stack([nn.functional.pad(b, (0, rank - b.shape[1])) for _, b in pairs])
        return SlotGroup(lora_a, lora_b, factor)


class MatrixStack:
    """The A or the B of a layer in neighbouring slots, padded with zeros to the highest rank.

    The optimizer needs the parameters of a slot in one piece, and the products need the matrices of a layer in one
    piece. So the matrices are copied once a step, and the same copy casts them to the dtype of the products.

    Attributes:
        values: (slots, rank, d_in) for A, or (slots, d_out, rank) for B, in the dtype of the products.
        leaf: Has the shape of `values` and the dtype of the parameters. Backward passes add the gradients to it. If
            `values` have another dtype, its own values are undefined.
    """

    def __init__(
        self,
        layers: Sequence[LoraLayer | None],
        which: Literal["a", "b"],
        *,
        width: int,
        like: nn.Parameter,
        dtype: torch.dtype,
    ) -> None:
        """Makes an empty stack. `layers` has the LoRA layer of each slot, or None if the slot does not adapt the layer.

        `width` is d_in for A, d_out for B. The gradients have the dtype and the device of `like`.
        """
        used = [(slot, layer) for slot, layer in enumerate(layers) if layer]
        rank = max((layer.rank for _, layer in used), default=0)
        size = (len(layers), rank, width) if which == "a" else (len(layers), width, rank)
        self._matrices: list[Tensor] = [layer.lora_a if which == "a" else layer.lora_b for _, layer in used]
        self._places: list[tuple[int | slice, ...]] = [
            (slot, slice(layer.rank)) if which == "a" else (slot, slice(None), slice(layer.rank))
            for slot, layer in used
        ]
        self.values: Float[Tensor, "slots rows columns"] = like.new_zeros(size, dtype=dtype)
        # views, so that one `_foreach_copy_` fills the whole stack
        self._targets = [self.values[place] for place in self._places]
        # one number that looks like a whole tensor, because only its gradient needs memory
        unused = like.new_zeros(()).expand(size)
        self.leaf: Float[Tensor, "slots rows columns"] = self.values.detach() if dtype == like.dtype else unused
        self.leaf.requires_grad_()

    def fits(self, dtype: torch.dtype, device: torch.device) -> bool:
        return (self.values.dtype, self.values.device) == (dtype, device)

    @torch.no_grad()
    def fill(self) -> None:
        """Copies the parameters into `values`, and forgets gradients that were not collected."""
        self.leaf.grad = None
        if self._matrices:  # empty if no slot of the group adapts this layer
            torch._foreach_copy_(self._targets, self._matrices)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Adds the gradients since `fill` to those of the parameters."""
        if self.leaf.grad is None or not self._matrices:
            return
        for parameter in self._matrices:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in self._matrices if parameter.grad is not None]
        torch._foreach_add_(grads, [self.leaf.grad[place] for place in self._places])
        self.leaf.grad = None


class PackedTrainedModule(SlotRows, nn.Module):
    """A frozen module, and the trainable copy of each slot that trains it in full. Other slots use the frozen module.

    Attributes:
        base: The frozen original.
        slots: The slots of the pack. All layers of the pack share this object.
        modules_of_slots: For each slot, the `TrainedModule` of its solo model; None if the slot does not train it.
        trained: The parameters of all copies.
    """

    def __init__(self, base: nn.Module, slots: Slots, modules: Sequence[TrainedModule | None]) -> None:
        super().__init__()
        self.base = base
        self.slots = slots
        self.modules_of_slots = list(modules)
        self.trained = nn.ParameterList(p for module in modules if module for p in module.trained.parameters())

    @property
    def weight(self) -> Tensor:
        """The base's weight. Some models read the dtype or device of their head's weight."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module for each slot, and concatenates the outputs.

        Each argument that has as many rows as the first tensor is split by slot. All slots get the other arguments
        whole.
        """
        leaves, spec = tree_flatten((args, kwargs))
        first = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        check_rows(first, self.slots.num_slots)
        outputs, output_spec = [], spec
        for slot, module in enumerate(self.modules_of_slots):
            sliced = [
                leaf.chunk(self.slots.num_slots)[slot]
                if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == len(first)
                else leaf
                for leaf in leaves
            ]
            # so that dropout inside the module draws from this slot's stream
            with self.slots.compute_only_slot(slot):
                output, output_spec = tree_flatten(self._call(module, *tree_unflatten(sliced, spec)))
            outputs.append(output)
        joined = [torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*outputs, strict=True)]
        return tree_unflatten(joined, output_spec)

    def _call(self, module: TrainedModule | None, args: Any, kwargs: Any) -> Any:
        if module is None:
            return self.base(*args, **kwargs)
        parameters: dict[str, Tensor] = dict(module.trained.named_parameters())

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.base, parameters, args, kwargs)

        return call_in_precision_of(self.base, call, args, kwargs)


def group_like_ranks(ranks: Sequence[int]) -> list[slice]:
    """Returns neighbouring slots whose products are computed together, padded to the highest rank of the group.

    The ranks of a group are equal or at most `MIN_GROUP_RANK`. So sorting the slots by rank gives the fewest groups.
    """
    widths = [max(rank, MIN_GROUP_RANK) for rank in ranks]
    starts = [slot for slot, width in enumerate(widths) if slot == 0 or width != widths[slot - 1]]
    return [slice(first, end) for first, end in itertools.pairwise([*starts, len(ranks)])]


def packed_layers(model: nn.Module) -> dict[str, PackedLoraLayer]:
    """Returns the packed layers of `model` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLoraLayer)}


def packed_trained_modules(model: nn.Module) -> dict[str, PackedTrainedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedTrainedModule)}
