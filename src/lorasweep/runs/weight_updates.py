"""Reads the weight update ΔW of each trained weight, and measures its norms and singular values in float64.

ΔW is a low-rank product for LoRA, and a difference for other methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorasweep.lora import LoraLayer, lora_layers
from lorasweep.lora.fully_trained import TrainedModule
from lorasweep.lora.layer_kinds import dequantised_weight, is_quantised, weight_to_matrix
from lorasweep.lora.targets import Target

ENERGY_FRACTION = 0.9
"""Fraction of the squared norm that `energy_rank` directions hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightUpdate:
    """The update ΔW of one weight as a matrix (d_out, d_in), or as a vector (d,) for a bias or a norm."""

    name: str
    """Name of the layer in the base model, or of the bias. A fused projection has an update for each part, whose rows
    stand in brackets: `c_attn[0:64]`."""
    base: Tensor
    """W0, (d_out, d_in) or (d,)."""
    left: Tensor
    """ΔW, or B (d_out, r) of ΔW = B A, multiplied by the scaling."""
    right: Tensor | None = None
    """A (r, d_in), or None if `left` is ΔW."""
    rank: int | None = None
    """Rank at which LoRA trained it; None for other methods."""

    @property
    def is_matrix(self) -> bool:
        return self.base.dim() == 2

    @property
    def kind(self) -> str:
        """The last component of the name, which is the same in every block: `q_proj` or `q_proj.bias`."""
        names = self.name.split(".")
        return ".".join(names[-2:] if names[-1] == "bias" else names[-1:])


@torch.no_grad()
def read_weight_updates(
    model: nn.Module, base: nn.Module, *, targets: Mapping[str, Target] = MappingProxyType({})
) -> list[WeightUpdate]:
    """Returns the updates of LoRA layers, then the updates of other trained weights, each in the model's order.

    Updates are not rounded to the base's dtype. Weights that did not change are skipped, except in LoRA layers.

    Args:
        model: The trained model. It was copied from `base` and shares its frozen tensors.
        base: The base model, with the new head as the run initialised it.
        targets: How LoRA trained each layer. An adapter file has PiSSA and parts of fused projections as plain LoRA
            layers of a higher rank, so a loaded layer does not know it. If missing, the layer's own target counts.
    """
    updates = [
        update
        for name, layer in lora_layers(model).items()
        for update in _read_lora_layer(name, layer, targets.get(name, layer.target))
    ]
    return [*updates, *_read_trained_weights(model, base)]


def _read_lora_layer(name: str, layer: LoraLayer, target: Target) -> Iterator[WeightUpdate]:
    base = dequantised_weight(layer.base) if is_quantised(layer.base) else weight_to_matrix(layer.base, layer.weight)
    lora_a, lora_b = (matrix.detach() for matrix in layer.get_plain_matrices())
    lora_b = layer.scaling * lora_b.double()
    if layer.magnitude is not None:
        # DoRA's new row norms change every direction, so ΔW has no low rank (arXiv 2402.09353, equation 5)
        matrix = base.double() + lora_b @ lora_a.double()
        matrix *= (layer.magnitude.double() / torch.linalg.vector_norm(matrix, dim=1))[:, None]
        yield WeightUpdate(name=name, base=base, left=matrix - base.double(), rank=target.rank)
        return
    rows = target.row_ranges or ((0, len(base)),)
    for index, (first, end) in enumerate(rows):
        # A has a block of `rank` rows for each range of rows; an adapter of PiSSA has the same blocks twice
        part_rows = [row for row in range(len(lora_a)) if row // target.rank % len(rows) == index]
        yield WeightUpdate(
            name=f"{name}[{first}:{end}]" if target.row_ranges else name,
            base=base[first:end],
            left=lora_b[first:end][:, part_rows],
            right=lora_a[part_rows],
            rank=target.rank,
        )


def _read_trained_weights(model: nn.Module, base: nn.Module) -> Iterator[WeightUpdate]:
    """Yields the updates of parameters that are copies of the base's parameters, or that a parametrization computes."""
    originals = dict(base.named_parameters(remove_duplicate=False))
    skipped = {id(p) for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)}
    for name, weight in (*_projected_weights(model), *model.named_parameters()):
        plain = _plain_name(name, model)
        original = originals.get(plain)
        if id(weight) in skipped or original is None or weight is original:
            continue
        difference = weight.detach().double() - original.detach().double()
        if difference.any():
            yield _make_update(plain, base, original.detach(), difference)


def _projected_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of each weight that `method=intrinsic` computes from a base weight, in fp32 or wider."""
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


def _make_update(name: str, base: nn.Module, original: Tensor, difference: Tensor) -> WeightUpdate:
    if original.dim() > 1:
        owner = base.get_submodule(name.rpartition(".")[0])
        original, difference = weight_to_matrix(owner, original), weight_to_matrix(owner, difference)
    return WeightUpdate(name=name.removesuffix(".weight"), base=original, left=difference)


def _plain_name(name: str, model: nn.Module) -> str:
    """Returns the name that a parameter has in the base model: `head.weight` for `head.trained.weight`."""
    parts = name.split(".")
    for index in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:index]))
        if isinstance(module, LoraLayer | TrainedModule):
            return ".".join(parts[:index] + parts[index + 1 :])
    return name


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposition:
    """A thin singular value decomposition U diag(s) Vᵀ of a matrix (d_out, d_in)."""

    u: Float[Tensor, "d_out n"]
    s: Float[Tensor, " n"]
    """Singular values in descending order."""
    vh: Float[Tensor, "n d_in"]


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """Norms and rank of the update of one weight; a line of `layers.csv`. Biases and norms have no rank."""

    layer: str
    kind: str
    d_out: int
    d_in: int | None
    trained_rank: int | None
    update_norm: float
    """‖ΔW‖_F."""
    base_norm: float
    """‖W0‖_F."""
    norm_share: float
    """‖ΔW‖²_F divided by its sum over all weights of the run."""
    energy_rank: int | None
    amplification: float | None
    """‖ΔW‖_F / ‖Uᵀ W0 V‖_F within the first directions of ΔW (LoRA, section 7.3). Their number is the trained rank, or
    `energy_rank` if LoRA did not train the weight."""


def decompose(left: Float[Tensor, "d_out r"], right: Float[Tensor, "r d_in"] | None = None) -> Decomposition:
    """Returns the decomposition of `left @ right`, or of `left` alone."""
    if right is None:
        u, s, vh = torch.linalg.svd(left.double(), full_matrices=False)
        return Decomposition(u=u, s=s, vh=vh)
    # With left = Q R and rightᵀ = P S, the product has the singular values of the small matrix R Sᵀ. This costs
    # (d_out + d_in) · r² instead of d_out · d_in · min(d_out, d_in), and the product is never computed.
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().t())
    u, s, vh = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    return Decomposition(u=q_left @ u, s=s, vh=vh @ q_right.t())


def energy_rank(s: Float[Tensor, " n"]) -> int:
    """Returns the smallest number of directions that hold 90 % of the squared norm; 0 if all values are zero."""
    if not s.any():
        return 0
    held = (s / s[0]).square().cumsum(0)  # divided by the largest value, so that squares do not underflow
    return int((held < ENERGY_FRACTION * held[-1]).sum().item()) + 1


def measure_layers(
    updates: Sequence[WeightUpdate], decompositions: Mapping[str, Decomposition]
) -> tuple[LayerRow, ...]:
    """Returns a row for each update, in order. `decompositions` has an entry for each update that is a matrix."""
    norms = [torch.linalg.vector_norm(decompositions[u.name].s if u.is_matrix else u.left).item() for u in updates]
    total = sum(norm**2 for norm in norms)
    rows = []
    for update, norm in zip(updates, norms, strict=True):
        parts = decompositions.get(update.name)
        rows.append(
            LayerRow(
                layer=update.name,
                kind=update.kind,
                d_out=update.base.shape[0],
                d_in=update.base.shape[1] if update.is_matrix else None,
                trained_rank=update.rank,
                update_norm=norm,
                base_norm=torch.linalg.vector_norm(update.base.double()).item(),
                norm_share=norm**2 / total if total else 0.0,
                energy_rank=energy_rank(parts.s) if parts else None,
                amplification=_amplification(parts, update.base, rank=update.rank) if parts else None,
            )
        )
    return tuple(rows)


def _amplification(parts: Decomposition, base: Tensor, *, rank: int | None) -> float | None:
    """Returns the amplification factor (LoRA, Table 7); None if W0 is zero in the directions of ΔW."""
    count = min(rank or energy_rank(parts.s), len(parts.s))
    inside = torch.linalg.matrix_norm(parts.u[:, :count].t() @ base.double() @ parts.vh[:count].t()).item()
    return torch.linalg.vector_norm(parts.s[:count]).item() / inside if inside > 0 else None


def relative_norm(rows: Sequence[LayerRow]) -> float | None:
    """Returns ‖ΔW‖_F / ‖W0‖_F of all these weights together; None if W0 is zero."""
    base = sum(row.base_norm**2 for row in rows) ** 0.5
    return sum(row.update_norm**2 for row in rows) ** 0.5 / base if base else None
