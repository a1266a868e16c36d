"""Modules that slots of a pack train in full (`modules_to_save`), with one copy per slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from lorasweep.lora.fully_trained import TrainedModule, call_in_precision_of, copy_as_trainable
from lorasweep.lora.packed.dropout import SlotStreams, check_rows


class StackedModule(nn.Module):
    """A frozen module, and a trainable fp32 copy for each slot that trains it. Other slots use the frozen module.

    Attributes:
        base: The frozen original.
        streams: The number of slots and their dropout streams. The whole pack shares this object.
        has_copy: For each slot, whether it has a copy. Initially no slot has a copy.
        parameter_names: Names of the parameters inside the module, in the order of `stacked`.
        stacked: For each parameter, the copies of all slots as (slots, *shape); zeros for a slot without a copy.
    """

    def __init__(self, base: nn.Module, streams: SlotStreams) -> None:
        super().__init__()
        self.base = base
        self.streams = streams
        self.has_copy = [False] * streams.num_slots
        parameters = dict(base.named_parameters())
        self.parameter_names = tuple(parameters)
        self.stacked = nn.ParameterList(
            torch.zeros(
                len(self.has_copy), *p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device
            )
            for p in parameters.values()
        )

    @property
    def weight(self) -> Tensor:
        """The base's weight. Some models read the dtype or device of their head's weight."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def is_used(self) -> bool:
        return any(self.has_copy)

    @torch.no_grad()
    def write_slot(self, slot: int, module: TrainedModule | None) -> None:
        """Copies the trained values of `module` into a slot. With None, the slot uses the frozen module."""
        values = {} if module is None else dict(module.trained.named_parameters())
        for name, stacked in zip(self.parameter_names, self.stacked, strict=True):
            stacked[slot] = values[name].to(stacked) if values else 0
        self.has_copy[slot] = module is not None

    def copy_slot(self, slot: int, base: nn.Module) -> TrainedModule | None:
        """Returns a `TrainedModule` for a solo model, with the slot's trained values; None if the slot has no copy.

        Args:
            slot: The slot to copy.
            base: The frozen module of the solo model.
        """
        if not self.has_copy[slot]:
            return None
        module = copy_as_trainable({"": base})[""]
        for name, value in self._get_parameters(slot).items():
            module.trained.get_parameter(name).data = value.detach().clone()
        return module

    def keep_slots(self, keep: Sequence[int]) -> None:
        """Drops all other slots. The caller must drop their streams."""
        self.has_copy = [self.has_copy[slot] for slot in keep]
        for stacked in self.stacked:
            stacked.data, stacked.grad = stacked.detach()[list(keep)], None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module for each slot, and concatenates the outputs.

        Each argument that has as many rows as the first tensor is split by slot. All slots get the other arguments
        whole.
        """
        leaves, spec = tree_flatten((args, kwargs))
        num_rows = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        outputs, output_spec = [], spec
        for slot in range(len(self.has_copy)):
            slot_args, slot_kwargs = tree_unflatten(
                [self._slice_for_slot(leaf, slot, num_rows) for leaf in leaves], spec
            )
            # so that dropout inside the module draws from this slot's stream
            with self.streams.compute_only_slot(slot):
                output, output_spec = tree_flatten(self._call_slot(slot, slot_args, slot_kwargs))
            outputs.append(output)
        joined = [torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*outputs, strict=True)]
        return tree_unflatten(joined, output_spec)

    def _call_slot(self, slot: int, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if not self.has_copy[slot]:
            return self.base(*args, **kwargs)
        parameters = self._get_parameters(slot)

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.base, parameters, args, kwargs)

        return call_in_precision_of(self.base, call, args, kwargs)

    def _get_parameters(self, slot: int) -> dict[str, Tensor]:
        return {name: stacked[slot] for name, stacked in zip(self.parameter_names, self.stacked, strict=True)}

    def _slice_for_slot(self, leaf: Any, slot: int, num_rows: int) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != num_rows:
            return leaf
        check_rows(leaf, len(self.has_copy))
        return leaf.chunk(len(self.has_copy))[slot]


def stacked_modules(model: nn.Module) -> dict[str, StackedModule]:
    """Returns the `StackedModule`s of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StackedModule)}
