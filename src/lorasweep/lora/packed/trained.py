"""A module that slots train in full (`modules_to_save`), one copy per slot: the stacked twin of `lora.trained`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lorasweep.lora.packed.dropout import SlotStreams, check_rows
from lorasweep.lora.packed.functional import split_rows
from lorasweep.lora.trained import TrainedModule, copy_to_train


class StackedModule(nn.Module):
    """A module of which each slot trains its own copy in fp32; slots that do not train it use the frozen one.

    Attributes:
        base: The frozen original.
        streams: Shared by the pack.
        trains: Which slots have a copy.
        names: Names of the parameters inside the module, in the order of `stacked`.
        stacked: The copies, each parameter as (slots, *shape); zero where a slot has none.
    """

    def __init__(self, base: nn.Module, streams: SlotStreams) -> None:
        """Makes the stack for the slots of `streams`, none of which has a copy yet."""
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
        """Whether any slot has a copy."""
        return any(self.trains)

    @torch.no_grad()
    def put(self, slot: int, module: TrainedModule | None) -> None:
        """Gives a slot the values of this module's copy, or the frozen module."""
        values = {} if module is None else dict(module.trained.named_parameters())
        for name, stacked in zip(self.names, self.stacked, strict=True):
            stacked[slot] = values[name].to(stacked) if values else 0
        self.trains[slot] = module is not None

    def take(self, slot: int, base: nn.Module) -> TrainedModule | None:
        """A slot's copy as an ordinary trained module beside `base`; None where the slot does not train it."""
        if not self.trains[slot]:
            return None
        taken = copy_to_train({"": base})[""]
        for name, value in self._of_slot(slot).items():
            taken.trained.get_parameter(name).data = value.detach().clone()
        return taken

    def keep_slots(self, keep: Sequence[int]) -> None:
        """Drops the other slots. The streams are the caller's to drop."""
        self.trains = [self.trains[slot] for slot in keep]
        for stacked in self.stacked:
            stacked.data, stacked.grad = stacked.detach()[list(keep)], None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives for the rows of each slot, slot after slot.

        Tensors with as many rows as the first one are shared out among the slots, other arguments are given to each.
        """
        if type(self.base) is nn.Linear and all(self.trains):
            return self._multiply(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        num_rows = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        outputs = []
        for slot in range(len(self.trains)):
            of_slot = [self._rows(leaf, slot, num_rows) for leaf in leaves]
            slot_args, slot_kwargs = tree_unflatten(of_slot, spec)
            with self.streams.alone(slot):
                outputs.append(self._call(slot, slot_args, slot_kwargs))
        flat = [tree_flatten(output) for output in outputs]
        return tree_unflatten([_join(parts) for parts in zip(*(f[0] for f in flat), strict=True)], flat[0][1])

    def _multiply(self, input: Tensor) -> Tensor:
        """What the loop over slots gives for a linear layer, as one batched product."""
        check_rows(input, len(self.trains))
        weight, *bias = self.stacked  # (slots, d_out, d_in)
        y_dtype = None if weight.dtype == self.weight.dtype else self.weight.dtype
        x = split_rows(input, len(self.trains))  # (slots, tokens, d_in)
        x = x if y_dtype is None else x.to(weight.dtype)
        y = torch.baddbmm(bias[0][:, None], x, weight.mT) if bias else x.bmm(weight.mT)
        return y.view(*input.shape[:-1], -1).to(y_dtype or y.dtype)

    def _call(self, slot: int, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if not self.trains[slot]:
            return self.base(*args, **kwargs)
        outer = next((p.dtype for p in self.base.parameters()), None)
        inner = next((p.dtype for p in self.stacked), None)
        if inner == outer:
            return functional_call(self.base, self._of_slot(slot), args, dict(kwargs))
        args, kwargs = _cast((args, kwargs), inner)
        return _cast(functional_call(self.base, self._of_slot(slot), args, dict(kwargs)), outer)

    def _of_slot(self, slot: int) -> dict[str, Tensor]:
        return {name: stacked[slot] for name, stacked in zip(self.names, self.stacked, strict=True)}

    def _rows(self, leaf: Any, slot: int, num_rows: int) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != num_rows:
            return leaf
        check_rows(leaf, len(self.trains))
        return leaf.chunk(len(self.trains))[slot]


def stacked_modules(model: nn.Module) -> dict[str, StackedModule]:
    """The modules that slots of `model` train in full, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StackedModule)}


def _join(parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else parts[0]


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(cast, values)
