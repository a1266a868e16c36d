"""The trained numbers of a pack, stored where they are used.

Neighbouring slots of similar rank form a group. All A and B of a group are one fp32 tensor with a row for each slot:

    row of a slot:  A of layer 0 | A of layer 1 | ... | B of layer 0 | B of layer 1 | ...

The columns of a layer are a stack (slots, rank, width), which a product takes without a copy. A lower rank is padded
with zeros to the highest rank of the group: a padded row of A meets a padded row of B, so both have zero gradients and
stay zero. The modules that train in full (heads) are rows of a second tensor, matrices first. The parameters of a
slot's solo model are views of its row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasweep.lora.dropout import make_constants
from lorasweep.lora.fully_trained import trained_modules
from lorasweep.lora.functional import SlotGroup
from lorasweep.lora.layer_kinds import matrix_shape
from lorasweep.lora.layers import LoraLayer, lora_layers

MIN_GROUP_RANK = 16
"""Slots of at most this rank form one group. On a CPU, a product with fewer rows takes as long as one with 16."""


class Block(NamedTuple):
    """Columns of a group's tensor that hold one matrix or vector of each slot."""

    name: str
    """Name of the parameter in the solo model."""
    shape: tuple[int, ...]
    """Shape of the columns of a slot, padded to the highest rank. B is transposed: (rank, d_out)."""
    is_b: bool = False

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


class Segment(NamedTuple):
    """Neighbouring blocks that train with the same settings. `kind` is lora_a, lora_b, matrices or vectors."""

    kind: str
    blocks: tuple[Block, ...]

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)


class Row(NamedTuple):
    """The columns of a segment that belong to one slot."""

    group: GroupWeights
    number: int
    """The slot's row in the group's tensors."""
    segment: Segment
    tensor: nn.Parameter
    columns: slice

    @property
    def kind(self) -> str:
        return self.segment.kind

    def view(self, tensor: Tensor) -> Tensor:
        """Returns these columns of `tensor` or its gradient as one vector; matrices as (1, size), since they decay."""
        row = tensor[self.number, self.columns]
        return row if self.kind == "vectors" else row[None]

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Returns the parts of values, which have the shape of `view`, by name of the parameter and in its shape."""
        return self.group.split(self.number, self.segment, values.view(-1))


class GroupWeights(nn.Module):
    """The trained numbers of neighbouring slots of similar rank.

    Attributes:
        solos: The solo models of the slots.
        lora: All A and B, (slots, columns).
        others: The modules that train in full, (slots, columns).
        factors: The factor of each slot's B in an evaluation and in training, (slots, 1), or (slots, columns of B) if
            the layers of a slot have different ones.
    """

    factors: list[Tensor]

    def __init__(
        self, solos: Sequence[nn.Module], shapes: Mapping[str, tuple[int, int]], *, device: torch.device
    ) -> None:
        """Copies the values of the solo models. `shapes` has (d_out, d_in) of each layer that the pack adapts."""
        super().__init__()
        self.solos = list(solos)
        layers = [lora_layers(solo) for solo in solos]
        by_name = {name: [one.get(name) for one in layers] for name in shapes}
        # a group without LoRA in a layer has blocks of rank 0
        self.ranks = {name: max(layer.rank if layer else 0 for layer in each) for name, each in by_name.items()}
        a = tuple(Block(f"{name}.lora_a", (self.ranks[name], d_in)) for name, (_, d_in) in shapes.items())
        b = tuple(Block(f"{name}.lora_b", (self.ranks[name], d_out), is_b=True) for name, (d_out, _) in shapes.items())
        heads = [
            Block(f"{name}.trained.{key}", tuple(parameter.shape))
            for name, module in trained_modules(solos[0]).items()
            for key, parameter in module.trained.named_parameters()
        ]
        self.lora_segments = Segment("lora_a", a), Segment("lora_b", b)
        self.other_segments = (
            Segment("matrices", tuple(block for block in heads if len(block.shape) >= 2)),
            Segment("vectors", tuple(block for block in heads if len(block.shape) < 2)),
        )
        dtype = next(p for solo in solos for p in solo.parameters() if p.requires_grad).dtype
        columns = [sum(map(_size, segments)) for segments in (self.lora_segments, self.other_segments)]
        self.lora, self.others = (
            # DDP refuses a parameter that never gets a gradient
            nn.Parameter(torch.zeros(len(solos), num, dtype=dtype, device=device), requires_grad=num > 0)
            for num in columns
        )
        self._set_factors([[by_name[name][slot] for name in shapes] for slot in range(len(solos))], b)
        for slot, solo in enumerate(solos):
            given = dict(solo.named_parameters())
            with torch.no_grad():
                for name, view in self.views(slot).items():
                    view.copy_(given[name])
        self.attach()

    @property
    def num_slots(self) -> int:
        return len(self.solos)

    def iter_segments(self) -> Iterator[tuple[Segment, nn.Parameter, slice]]:
        """Yields each segment that has columns, with its tensor and its columns there."""
        for segments, tensor in ((self.lora_segments, self.lora), (self.other_segments, self.others)):
            first = 0
            for segment in segments:
                if segment.size:
                    yield segment, tensor, slice(first, first + segment.size)
                first += segment.size

    def views(self, slot: int) -> dict[str, Tensor]:
        """Returns the parameters of a slot's solo model by name, as views of the tensors."""
        return {
            name: view
            for segment, tensor, columns in self.iter_segments()
            for name, view in self.split(slot, segment, tensor.detach()[slot, columns]).items()
        }

    def split(self, slot: int, segment: Segment, row: Tensor) -> dict[str, Tensor]:
        """Returns the parts of a slot's columns of a segment, by name of the parameter and in its shape.

        `row` may also hold gradients or moments of an optimizer. What a slot does not adapt is left out.
        """
        layers, found = lora_layers(self.solos[slot]), {}
        for block, part in zip(segment.blocks, torch.split(row, [block.size for block in segment.blocks]), strict=True):
            layer_name, _, key = block.name.rpartition(".")
            if key not in ("lora_a", "lora_b"):
                found[block.name] = part.view(block.shape)
            elif layer := layers.get(layer_name):
                matrix = part.view(block.shape)[: layer.rank]
                found[block.name] = matrix.mT if block.is_b else matrix
        return found

    def attach(self) -> None:
        """Makes the parameters of the solo models views of the tensors, for example after a move to another device."""
        for slot, solo in enumerate(self.solos):
            for name, view in self.views(slot).items():
                module, _, key = name.rpartition(".")
                setattr(solo.get_submodule(module), key, nn.Parameter(view))
        self.factors = [factor.to(self.lora.device, self.lora.dtype) for factor in self._exact_factors]

    def stack(self, *, dtype: torch.dtype, is_training: bool) -> dict[str, SlotGroup]:
        """Returns A and the scaled B of each layer in the dtype of its products, by plain operations of torch."""
        (a_blocks, b_blocks) = (segment.blocks for segment in self.lora_segments)
        sizes = [segment.size for segment in self.lora_segments]
        a, b = torch.split(self.lora, sizes, dim=1)
        # scaled in the dtype of the parameters, so that a product is rounded once
        b = _Scale.apply(b, self.factors[is_training]).to(dtype)  # type: ignore[no-untyped-call]
        parts = [
            part.view(self.num_slots, *block.shape)
            for values, blocks in ((a.to(dtype), a_blocks), (b, b_blocks))
            for part, block in zip(torch.split(values, [block.size for block in blocks], dim=1), blocks, strict=True)
        ]
        return {
            name: SlotGroup(part_a, part_b.mT)
            for name, part_a, part_b in zip(self.ranks, parts, parts[len(self.ranks) :], strict=False)
        }

    def split_others(self) -> list[dict[str, Tensor]]:
        """Returns the parameters of each slot's modules that train in full, by name."""
        blocks = [block for segment in self.other_segments for block in segment.blocks]
        if not blocks:
            return [{} for _ in self.solos]
        rows = self.others.unbind()
        return [
            {block.name: part.view(block.shape) for block, part in zip(blocks, parts, strict=True)}
            for parts in (torch.split(row, [block.size for block in blocks]) for row in rows)
        ]

    def _set_factors(self, layers: Sequence[Sequence[LoraLayer | None]], b: Sequence[Block]) -> None:
        self._exact_factors: list[Tensor] = []
        for is_training in (False, True):
            by_layer = torch.tensor(
                [[layer.compute_factor(is_training=is_training) if layer else 0.0 for layer in one] for one in layers],
                dtype=torch.float64,
            )
            adapted = torch.tensor([[layer is not None for layer in one] for one in layers])
            highest = by_layer.amax(1, keepdim=True)
            if bool(torch.where(adapted, by_layer == highest, True).all()):
                self._exact_factors.append(highest)
            else:
                columns = torch.tensor([block.size for block in b])
                self._exact_factors.append(by_layer.repeat_interleave(columns, dim=1))


class SlotWeights(nn.Module):
    """The trained numbers of all slots of a pack. Its parameters are those to train.

    Attributes:
        groups: The groups of slots, in slot order.
    """

    def __init__(self, solos: Sequence[nn.Module], *, device: torch.device) -> None:
        super().__init__()
        layers = {name: layer for solo in solos for name, layer in lora_layers(solo).items()}
        shapes = {name: matrix_shape(layer.base) for name, layer in layers.items()}
        keys = [_find_group(solo, list(shapes)) for solo in solos]
        starts = [slot for slot, key in enumerate(keys) if slot == 0 or key != keys[slot - 1]]
        ranges = [slice(first, end) for first, end in itertools.pairwise([*starts, len(solos)])]
        self.groups = nn.ModuleList(GroupWeights(solos[slots], shapes, device=device) for slots in ranges)
        self.places = [(group, n) for group in self.iter_groups() for n in range(group.num_slots)]
        """The group of each slot, and its row there."""
        self._stacks: dict[Any, tuple[list[int], dict[str, list[SlotGroup]]]] = {}
        self._others: tuple[Any, list[dict[str, Tensor]]] | None = None
        for group in self.iter_groups():  # because an optimizer may step next, and fused ones are not counted
            group.lora.register_post_accumulate_grad_hook(lambda _: self.forget())  # type: ignore[no-untyped-call]

    def iter_groups(self) -> Iterator[GroupWeights]:
        yield from self.groups  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotWeights:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.forget()
        for group in self.iter_groups():
            group.attach()
        return self

    def forget(self) -> None:
        """Frees the stacks. Call it after a change of values that torch does not count, as of fused optimizers."""
        self._stacks, self._others = {}, None

    def find_stacks(self, layer: str, *, dtype: torch.dtype, is_training: bool) -> list[SlotGroup]:
        """Returns A and the scaled B of a layer, by group. All layers share what is made for the first one."""
        key = dtype, is_training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        versions = self._count_changes()
        known = self._stacks.get(key)
        if known is None or known[0] != versions:
            groups = [group.stack(dtype=dtype, is_training=is_training) for group in self.iter_groups()]
            known = self._stacks[key] = versions, {name: [stack[name] for stack in groups] for name in groups[0]}
        return known[1][layer]

    def find_others(self, slot: int) -> dict[str, Tensor]:
        """Returns the parameters of a slot's modules that train in full, by name."""
        key = self._count_changes(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if self._others is None or self._others[0] != key:
            self._others = key, [one for group in self.iter_groups() for one in group.split_others()]
        return self._others[1][slot]

    def views(self, slot: int) -> dict[str, Tensor]:
        """Returns the parameters of a slot's solo model by name, as views."""
        group, row = self.places[slot]
        return group.views(row)

    def find_rows(self, slot: int) -> list[Row]:
        """Returns what a slot trains as a few long vectors."""
        group, number = self.places[slot]
        return [Row(group, number, *place) for place in group.iter_segments()]

    @torch.no_grad()
    def clip_gradients(self, max_norms: Sequence[float | None]) -> None:
        """Clips the gradients of each slot to its maximum norm as `torch.nn.utils.clip_grad_norm_`; None: not."""
        first = 0
        for group in self.iter_groups():
            limits = max_norms[first : first + group.num_slots]
            first += group.num_slots
            grads = [tensor.grad for tensor in (group.lora, group.others) if tensor.grad is not None and tensor.numel()]
            if not grads or all(limit is None for limit in limits):
                continue
            norms = torch.linalg.vector_norm(torch.stack([grad.norm(dim=1) for grad in grads]), dim=0)
            numbers = tuple(torch.inf if limit is None else limit for limit in limits)
            highest = make_constants(numbers, dtype=norms.dtype, device=norms.device)
            factors = (highest / (norms + 1e-6)).clamp_(max=1.0)[:, None]
            for grad in grads:
                grad.mul_(factors)

    def _count_changes(self) -> list[int]:
        return [tensor._version for group in self.iter_groups() for tensor in (group.lora, group.others)]


class _Scale(torch.autograd.Function):
    """b · factors. It saves no tensor, because torch frees those after the first of several backward passes.

    Activation checkpointing would also count a saved tensor of the first pass, and miss it when it computes again.
    """

    @staticmethod
    def forward(ctx: Any, b: Tensor, factors: Tensor) -> Tensor:
        ctx.factors = factors
        return b * factors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factors, None


def _size(segment: Segment) -> int:
    return segment.size


def _find_group(solo: nn.Module, names: Sequence[str]) -> tuple[Any, ...]:
    """Returns a key that is equal for slots whose weights can be rows of one tensor without much padding."""
    layers = lora_layers(solo)
    widths = [max(layers[name].rank if name in layers else 0, MIN_GROUP_RANK) for name in names]
    return *widths, *trained_modules(solo)
