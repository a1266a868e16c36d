"""The modules of a pack: a frozen layer or module with the weights of all slots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten  # see lora.fully_trained

from lorasweep.lora.fully_trained import TrainedModule, call_in_precision_of
from lorasweep.lora.functional import SlotGroup
from lorasweep.lora.layer_kinds import matrix_shape
from lorasweep.lora.layers import AdaptedLayer, LoraLayer
from lorasweep.lora.packed.slots import Slots, check_slot_rows
from lorasweep.lora.packed.stacks import MatrixStack

MIN_GROUP_RANK = 16
"""Slots of at most this rank form one group. On a CPU, a product with fewer rows takes as long as one with 16."""


class SlotRows:
    """A module whose inputs have the rows of all slots, slot after slot."""

    slots: Slots

    @property
    def num_groups(self) -> int:
        return self.slots.num_slots


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
        self.rates = [layer.config.dropout if layer else 0.0 for layer in layers]
        self._groups = group_like_ranks(self.ranks)
        self._stacks: list[tuple[MatrixStack, MatrixStack]] = []

    def forward(self, x: Shaped[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        # slot-major rows: then the rows of a slot, and of a group of slots, are one view of x without a copy
        check_slot_rows(x, self.slots.num_slots)
        keep = self.slots.draw_keep_mask(x, rates=self.rates) if self.training and any(self.rates) else None
        return self.add_update(x, self._stack_groups(), keep=keep)

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"

    @property
    def dropout_rate(self) -> float:
        """The largest rate of a slot."""
        return max(self.rates)

    def _stack_groups(self) -> list[SlotGroup]:
        shared = self.slots.stacks
        if shared.is_training is not self.training:
            return [self._stack_group(group) for group in self._groups]
        return [SlotGroup(shared.use(stack_a), shared.use(stack_b).mT) for stack_a, stack_b in self._find_stacks()]

    def _find_stacks(self) -> list[tuple[MatrixStack, MatrixStack]]:
        """Returns A and B of each group, in the dtype of the products that `add_update` computes."""
        like, device_type = self.lora_a[0], self.weight.device.type
        if self.calls_base:
            dtype = like.dtype
        else:
            is_autocast = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if is_autocast else self.weight.dtype
        if not self._stacks or not self._stacks[0][0].fits(dtype, like.device):
            d_out, d_in = matrix_shape(self.base)
            self._stacks = [
                (
                    MatrixStack(self.layers[group], is_b=False, width=d_in, like=like, dtype=dtype),
                    MatrixStack(self.layers[group], is_b=True, width=d_out, like=like, dtype=dtype),
                )
                for group in self._groups
            ]
        return self._stacks

    def _stack_group(self, group: slice) -> SlotGroup:
        """Stacks the matrices of a group with plain operations of torch, so that autograd differentiates them."""
        d_out, d_in = matrix_shape(self.base)
        empty = self.lora_a[0].new_empty(0, d_in), self.lora_b[0].new_empty(d_out, 0)
        pairs = [
            (layer.lora_a, layer.lora_b * layer.compute_factor(is_training=self.training)) if layer else empty
            for layer in self.layers[group]
        ]
        rank = max(len(lora_a) for lora_a, _ in pairs)
        lora_a = torch.stack([nn.functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in pairs])
        lora_b = torch.stack([nn.functional.pad(b, (0, rank - b.shape[1])) for _, b in pairs])
        return SlotGroup(lora_a, lora_b)


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
        check_slot_rows(first, self.slots.num_slots)
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
