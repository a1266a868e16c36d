"""Modules that slots of a pack train in full (`modules_to_save`), as one stacked copy per slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from lorasweep.lora.fully_trained import TrainedModule, call_in_dtype_of, copy_to_train
from lorasweep.lora.packed.dropout import SlotStreams, check_rows


class StackedModule(nn.Module):
    """A module of which each slot trains its own copy in fp32; slots that do not train it use the frozen module.

    Attributes:
        base: The frozen original.
        streams: The number of slots and each slot's random stream for dropout; the whole pack shares this object.
        trains: Whether each slot has a copy; at first none has.
        names: Names of the parameters inside the module, in the order of `stacked`.
        stacked: The copies, each parameter as (slots, *shape); zero for slots without a copy.
    """

    def __init__(self, base: nn.Module, streams: SlotStreams) -> None:
        super().__init__()
        self.base = base
        self.streams = streams
        self.trains = [False] * streams.num_slots
        parameters = dict(base.named_parameters())
        self.names = tuple(parameters)
        self.stacked = nn.ParameterList(
            torch.zeros(len(self.trains), *p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for p in parameters.values()
        )

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that asks a head for its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def is_used(self) -> bool:
        return any(self.trains)

    @torch.no_grad()
    def put(self, slot: int, module: TrainedModule | None) -> None:
        """Copies the trained values of `module` into a slot; with None the slot uses the frozen module."""
        values = {} if module is None else dict(module.trained.named_parameters())
        for name, stacked in zip(self.names, self.stacked, strict=True):
            stacked[slot] = values[name].to(stacked) if values else 0
        self.trains[slot] = module is not None

    def take(self, slot: int, base: nn.Module) -> TrainedModule | None:
        """Returns a slot's copy as an ordinary trained module around `base`; None if the slot does not train it."""
        if not self.trains[slot]:
            return None
        taken = copy_to_train({"": base})[""]
        for name, value in self._parameters_of(slot).items():
            taken.trained.get_parameter(name).data = value.detach().clone()
        return taken

    def keep_slots(self, keep: Sequence[int]) -> None:
        """Drops the other slots. The caller drops their streams."""
        self.trains = [self.trains[slot] for slot in keep]
        for stacked in self.stacked:
            stacked.data, stacked.grad = stacked.detach()[list(keep)], None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module for each slot, and concatenates the outputs.

        Tensors with as many rows as the first tensor are split among the slots. All slots get the other arguments.
        """
        leaves, spec = tree_flatten((args, kwargs))
        num_rows = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        outputs, output_spec = [], spec
        for slot in range(len(self.trains)):
            slot_args, slot_kwargs = tree_unflatten([self._slice(leaf, slot, num_rows) for leaf in leaves], spec)
            with self.streams.alone(slot):  # dropout inside draws from this slot's stream only
                output, output_spec = tree_flatten(self._call(slot, slot_args, slot_kwargs))
            outputs.append(output)
        joined = [torch.cat(each) if isinstance(each[0], Tensor) else each[0] for each in zip(*outputs, strict=True)]
        return tree_unflatten(joined, output_spec)

    def _call(self, slot: int, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if not self.trains[slot]:
            return self.base(*args, **kwargs)
        parameters = self._parameters_of(slot)

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.base, parameters, args, kwargs)

        return call_in_dtype_of(parameters.values(), call, args, kwargs, base=self.base)

    def _parameters_of(self, slot: int) -> dict[str, Tensor]:
        return {name: stacked[slot] for name, stacked in zip(self.names, self.stacked, strict=True)}

    def _slice(self, leaf: Any, slot: int, num_rows: int) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != num_rows:
            return leaf
        check_rows(leaf, len(self.trains))
        return leaf.chunk(len(self.trains))[slot]


def stacked_modules(model: nn.Module) -> dict[str, StackedModule]:
    """Returns the modules that slots of `model` train in full, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StackedModule)}
