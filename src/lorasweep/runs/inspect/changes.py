"""What a run changed of its base, weight by weight: ΔW as a low-rank product where it is one, else as a difference.

Comes after `restore`, which gives the trained model; before `spectrum`, which says what the changes are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorasweep.lora import LoraLayer, TrainedModule, lora_layers
from lorasweep.lora.kinds import weight_to_matrix
from lorasweep.lora.patterns import block_index
from lorasweep.lora.quantised import dequantised_weight, is_quantised
from lorasweep.runs.inspect.spectrum import Decomposition, decompose


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where in the trained model a change is, so that `truncation` can put another in its place."""

    layer: str | None = None
    """Name of the LoRA layer that adds it."""
    first_row: int = 0
    """First row of that layer's matrix that it changes (a part of a fused projection)."""
    weight: str | None = None
    """Name of the weight, where no LoRA layer adds it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What a run changed of one weight, seen as a matrix (d_out, d_in); of a bias or a norm, a vector (d,)."""

    name: str
    """The layer's name in the base model; its bias has the name of the bias, and a part of a fused projection its rows
    in brackets."""
    base: Tensor
    """W0 (d_out, d_in) or (d,)."""
    left: Tensor
    """ΔW itself, or B (d_out, r) of ΔW = B A with the scaling in it."""
    right: Tensor | None
    """A (r, d_in), or None where `left` is ΔW."""
    place: Place
    rank: int | None = None
    """Rank that it was trained at, of DoRA's B A; None where there was none."""
    lora_a: Tensor | None = None
    """A (r, d_in) as it was trained, for LoRA's own comparison of subspaces."""

    @property
    def is_matrix(self) -> bool:
        """Whether it has singular values."""
        return self.base.dim() == 2

    @property
    def block(self) -> int | None:
        """Index of its block: the first number in its name; None outside the blocks."""
        return block_index(self.name)

    @property
    def kind(self) -> str:
        """What it is in every block: the last part of its name, `q_proj` or `q_proj.bias`."""
        parts = self.name.split(".")
        return ".".join(parts[-2:] if parts[-1] == "bias" else parts[-1:])

    def decomposed(self) -> Decomposition:
        """Returns the singular value decomposition of a matrix's change."""
        return decompose(self.left, self.right)


@torch.no_grad()
def weight_changes(model: nn.Module, base: nn.Module) -> list[Change]:
    """Returns what training changed, in the model's order: LoRA layers first, then what trained in full.

    Nothing is rounded to the base's dtype on the way. What is as it was is left out; a LoRA layer never is.

    Args:
        model: A trained model, made from a copy of `base` that shares its frozen tensors.
        base: The base model, with the values that the run drew for what its checkpoint lacks.
    """
    changes = [change for name, layer in lora_layers(model).items() for change in _layer_changes(name, layer)]
    return [*changes, *_full_changes(model, base)]


def as_pissa_trained(changes: Sequence[Change]) -> list[Change]:
    """Returns changes of PiSSA layers that were read as they are stored, with the rank and the A that trained.

    What is stored is [A, A0] and [B, -B0], the start subtracted from what was trained (see `LoraLayer.matrices`).
    """
    return [
        change
        if change.rank is None or change.lora_a is None
        else replace(change, rank=change.rank // 2, lora_a=change.lora_a[: change.rank // 2])
        for change in changes
    ]


def _layer_changes(name: str, layer: LoraLayer) -> Iterator[Change]:
    base = _base_matrix(layer)
    if layer.magnitude is not None:
        yield _dora_change(name, layer, base)
        return
    lora_a, lora_b = (matrix.detach() for matrix in layer.matrices())
    lora_b = layer.scaling * lora_b.double()
    if not layer.rows:
        yield Change(
            name=name,
            base=base,
            left=lora_b,
            right=lora_a,
            place=Place(layer=name),
            rank=layer.rank,
            lora_a=layer.lora_a.detach(),
        )
        return
    size = len(layer.rows) * layer.rank
    for index, (first, past) in enumerate(layer.rows):
        own = slice(index * layer.rank, (index + 1) * layer.rank)
        columns = [
            column for start in range(0, len(lora_a), size) for column in range(start + own.start, start + own.stop)
        ]
        yield Change(
            name=f"{name}[{first}:{past}]",
            base=base[first:past],
            left=lora_b[first:past][:, columns],
            right=lora_a[columns],
            place=Place(layer=name, first_row=first),
            rank=layer.rank,
            lora_a=layer.lora_a.detach()[own],
        )


def _dora_change(name: str, layer: LoraLayer, base: Tensor) -> Change:
    """DoRA's W - W0: new row lengths change every direction, it is not of low rank (arXiv 2402.09353, equation 5)."""
    assert layer.magnitude is not None
    lora_a, lora_b = (matrix.double() for matrix in layer.matrices())
    matrix = base.double() + layer.scaling * (lora_b @ lora_a)
    matrix *= (layer.magnitude.double() / torch.linalg.vector_norm(matrix, dim=1))[:, None]
    return Change(
        name=name,
        base=base,
        left=matrix - base.double(),
        right=None,
        place=Place(layer=name),
        rank=layer.rank,
        lora_a=None if layer.rows else layer.lora_a.detach(),
    )


def _base_matrix(layer: LoraLayer) -> Tensor:
    if is_quantised(layer.base):
        return dequantised_weight(layer.base)
    return weight_to_matrix(layer.base, layer.weight)


def _full_changes(model: nn.Module, base: nn.Module) -> Iterator[Change]:
    """What trained on copies of the base's parameters or through a parametrization, by their names in the base."""
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
    """Weights that are computed from the base's (`method=intrinsic`), in fp32 or wider before they are rounded."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, steps in module.parametrizations.items():
            if id(steps.original) in seen:  # tied
                continue
            seen.add(id(steps.original))
            weight = steps.original.to(torch.promote_types(steps.original.dtype, torch.float32))
            for step in steps:
                weight = step(weight)
            yield f"{prefix}.{name}", weight


def _full_change(name: str, base: nn.Module, original: Tensor, difference: Tensor) -> Change:
    weights = [original, difference]
    if original.dim() > 1:
        owner = base.get_submodule(name.rpartition(".")[0])
        weights = [weight_to_matrix(owner, weight) for weight in weights]
    place = Place(weight=name)
    return Change(name=name.removesuffix(".weight"), base=weights[0], left=weights[1], right=None, place=place)


def _plain_name(name: str, model: nn.Module) -> str:
    """The name in the base of a parameter of an adapted model: `head.trained.weight` is `head.weight`."""
    parts = name.split(".")
    for index in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:index]))
        if isinstance(module, LoraLayer | TrainedModule):
            return ".".join(parts[:index] + parts[index + 1 :])
    return name
