"""The change ΔW of each weight of a trained model: a low-rank product where LoRA trained it, else a difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorasweep.lora import LoraLayer, lora_layers
from lorasweep.lora.layer_kinds import weight_to_matrix
from lorasweep.lora.quantised import dequantised_weight, is_quantised
from lorasweep.lora.trained import TrainedModule


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """The change ΔW of one weight, seen as a matrix (d_out, d_in); the change of a bias or a norm is a vector (d,)."""

    name: str
    """Name of the layer in the base model. A bias has the name of the bias. Rows of a fused projection that have a
    change of their own stand in brackets: `c_attn[0:64]`."""
    base: Tensor
    """W0, (d_out, d_in) or (d,)."""
    left: Tensor
    """ΔW itself, or B (d_out, r) of ΔW = B A, with the scaling in it."""
    right: Tensor | None = None
    """A (r, d_in), or None where `left` is ΔW."""
    rank: int | None = None
    """Rank at which it was trained; None unless LoRA trained it."""
    lora_layer: str | None = None
    """Name of the LoRA layer that adds the change; None where the weight itself was trained."""
    first_row: int = 0
    """First row of the LoRA layer's matrix that the change is added to."""
    weight: str | None = None
    """Name of the trained parameter; None where a LoRA layer adds the change."""

    @property
    def is_matrix(self) -> bool:
        """Whether it has singular values."""
        return self.base.dim() == 2

    @property
    def kind(self) -> str:
        """The last component of its name, which is the same in every block: `q_proj` or `q_proj.bias`."""
        names = self.name.split(".")
        return ".".join(names[-2:] if names[-1] == "bias" else names[-1:])


@torch.no_grad()
def weight_changes(model: nn.Module, base: nn.Module) -> list[Change]:
    """Returns the changes of a trained model in its order: LoRA layers first, then weights that trained in full.

    They are not rounded to the base's dtype. A weight that is as it was has no change; a LoRA layer always has one.

    Args:
        model: The trained model. It was made from a copy of `base` that shares its frozen tensors.
        base: The base model, with the new head as the run initialised it.
    """
    changes = [change for name, layer in lora_layers(model).items() for change in _layer_changes(name, layer)]
    return [*changes, *_full_changes(model, base)]


def _layer_changes(name: str, layer: LoraLayer) -> Iterator[Change]:
    base = _base_matrix(layer)
    lora_a, lora_b = (matrix.detach() for matrix in layer.matrices())
    lora_b = layer.scaling * lora_b.double()
    if layer.magnitude is not None:
        # DoRA's new row lengths change every direction, so ΔW is not of low rank (arXiv 2402.09353, equation 5)
        matrix = base.double() + lora_b @ lora_a.double()
        matrix *= (layer.magnitude.double() / torch.linalg.vector_norm(matrix, dim=1))[:, None]
        yield Change(name=name, base=base, left=matrix - base.double(), rank=layer.rank, lora_layer=name)
        return
    rows = layer.rows or ((0, len(base)),)
    for index, (first, past) in enumerate(rows):
        # A has a block of `rank` rows for each range of rows; PiSSA's start adds the same blocks once more
        own = [row for row in range(len(lora_a)) if row // layer.rank % len(rows) == index]
        yield Change(
            name=f"{name}[{first}:{past}]" if layer.rows else name,
            base=base[first:past],
            left=lora_b[first:past][:, own],
            right=lora_a[own],
            rank=layer.rank,
            lora_layer=name,
            first_row=first,
        )


def _base_matrix(layer: LoraLayer) -> Tensor:
    if is_quantised(layer.base):
        return dequantised_weight(layer.base)
    return weight_to_matrix(layer.base, layer.weight)


def _full_changes(model: nn.Module, base: nn.Module) -> Iterator[Change]:
    """Yields the changes of parameters that trained on copies of the base's or through a parametrization."""
    originals = dict(base.named_parameters(remove_duplicate=False))
    skipped = {id(p) for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)}
    for name, weight in (*_projected_weights(model), *model.named_parameters()):
        plain = _plain_name(name, model)
        original = originals.get(plain)
        if id(weight) in skipped or original is None or weight is original:
            continue
        difference = weight.detach().double() - original.detach().double()
        if difference.any():
            yield _full_change(plain, base, original.detach(), difference)


def _projected_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of weights that `method=intrinsic` computes from the base's, in fp32 or wider."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, steps in module.parametrizations.items():
            if id(steps.original) in seen:  # a weight that two modules share
                continue
            seen.add(id(steps.original))
            weight = steps.original.to(torch.promote_types(steps.original.dtype, torch.float32))
            for step in steps:
                weight = step(weight)
            yield f"{prefix}.{name}", weight


def _full_change(name: str, base: nn.Module, original: Tensor, difference: Tensor) -> Change:
    if original.dim() > 1:
        owner = base.get_submodule(name.rpartition(".")[0])
        original, difference = weight_to_matrix(owner, original), weight_to_matrix(owner, difference)
    return Change(name=name.removesuffix(".weight"), base=original, left=difference, weight=name)


def _plain_name(name: str, model: nn.Module) -> str:
    """Returns the base's name of a parameter of an adapted model: `head.trained.weight` is `head.weight` there."""
    parts = name.split(".")
    for index in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:index]))
        if isinstance(module, LoraLayer | TrainedModule):
            return ".".join(parts[:index] + parts[index + 1 :])
    return name
